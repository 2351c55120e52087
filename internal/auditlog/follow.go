package auditlog

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"
)

// followEvery is how often a log is looked at that has nothing new.
const followEvery = 200 * time.Millisecond

// Followable says why a source cannot be followed, if so, before anything is read.
func (s Source) Followable() error {
	if s.Size < 0 {
		return fmt.Errorf("%s is a pipe: what comes out of it is read to its end anyway", s.Name)
	}
	file, err := s.open()
	if err != nil {
		return err
	}
	defer file.Close()
	head := make([]byte, 4)
	n, err := io.ReadFull(file, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	if isGzip(head[:n]) || isZstd(head[:n]) {
		return fmt.Errorf("%s is packed, so nothing is written to it any more", s.Name)
	}
	return nil
}

// Follow returns a source that goes on with what is written to the file, also when it is rotated or cut, until the context ends.
func (s Source) Follow(ctx context.Context) Source {
	open := s.open
	s.open = func() (io.ReadCloser, error) {
		file, err := open()
		if err != nil {
			return nil, err
		}
		return &follower{ctx: ctx, path: s.Name, file: file.(*os.File)}, nil
	}
	return s
}

// follower reads a file that is written to.
type follower struct {
	ctx  context.Context
	path string
	file *os.File
}

func (f *follower) Close() error { return f.file.Close() }

// Read waits until there is something; it ends only with the context.
func (f *follower) Read(p []byte) (int, error) {
	for {
		replaced, err := f.replaced()
		if err != nil {
			return 0, err
		}
		// What was written before the file was replaced is read after that was seen.
		n, err := f.file.Read(p)
		if n > 0 || err != nil && !errors.Is(err, io.EOF) {
			return n, err
		}
		if replaced {
			if err := f.reopen(); err != nil {
				return 0, err
			}
			continue
		}
		select {
		case <-f.ctx.Done():
			return 0, io.EOF
		case <-time.After(followEvery):
		}
	}
}

// replaced says whether another file has taken the place of the one that is read, or whether that was cut and is written anew.
func (f *follower) replaced() (bool, error) {
	there, err := os.Stat(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		// Between two files of a rotation.
		return false, nil
	}
	if err != nil {
		return false, err
	}
	here, err := f.file.Stat()
	if err != nil {
		return false, err
	}
	at, err := f.file.Seek(0, io.SeekCurrent)
	return !os.SameFile(there, here) || there.Size() < at, err
}

func (f *follower) reopen() error {
	next, err := os.Open(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	old := f.file
	f.file = next
	return old.Close()
}
