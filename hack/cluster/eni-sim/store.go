package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// store keeps a pool in a directory of the node.
//
// Who changes the state holds the lock from load to save. Who only reads needs none: a save replaces the file whole.
type store struct{ dir string }

func (s store) file() string { return filepath.Join(s.dir, "state.json") }

// lock waits until no other process has the lock, and returns what gives it back. The directory is made if it is missing.
func (s store) lock() (unlock func(), err error) {
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	file, err := os.OpenFile(filepath.Join(s.dir, "lock"), os.O_RDONLY|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	for {
		err = unix.Flock(int(file.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("state: lock %s: %w", file.Name(), err), file.Close())
	}
	return func() { _ = file.Close() }, nil
}

// load returns the saved state; the error wraps fs.ErrNotExist if there is none yet.
func (s store) load() (*pool, error) {
	content, err := os.ReadFile(s.file())
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	p := &pool{}
	if err := json.Unmarshal(content, p); err != nil {
		return nil, fmt.Errorf("state: %s: %w", s.file(), err)
	}
	return p, nil
}

// loadFor returns the saved state, or on first use a new one. A state of other subnets or another size is an error: addresses
// of either could be given twice.
func (s store) loadFor(c config) (*pool, error) {
	p, err := s.load()
	if errors.Is(err, fs.ErrNotExist) {
		return newPool(c.Subnet, c.Subnet6, c.PoolSize), nil
	}
	if err != nil {
		return nil, err
	}
	if p.IPv4.Subnet != c.Subnet || p.IPv6.Subnet != c.Subnet6 || p.Size != c.PoolSize {
		return nil, fmt.Errorf("state: %s is of %d addresses of %s and of %s, but the network configuration says %d of %s and of %s; remove it when the node has no pods",
			s.file(), p.Size, p.IPv4.Subnet, p.IPv6.Subnet, c.PoolSize, c.Subnet, c.Subnet6)
	}
	return p, nil
}

// save replaces the saved state. After an error, or a crash at any time, the old or the new state is there, whole.
func (s store) save(p *pool) error {
	content, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	if err := s.replace(append(content, '\n')); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	return nil
}

func (s store) replace(content []byte) error {
	temp, err := os.CreateTemp(s.dir, "state-*.tmp")
	if err != nil {
		return err
	}
	defer os.Remove(temp.Name()) // after the rename there is nothing of that name
	_, err = temp.Write(content)
	err = errors.Join(err, temp.Chmod(0o644), temp.Sync(), temp.Close())
	if err != nil {
		return err
	}
	if err := os.Rename(temp.Name(), s.file()); err != nil {
		return err
	}
	dir, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
