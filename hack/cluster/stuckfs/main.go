// Command stuckfs mounts a file system whose one file never answers a read. A process that reads the file waits in the
// kernel (request_wait_answer); once it is killed it stays there in state D, as the processes of the incident did, until
// stuckfs lets go.
//
// Usage: stuckfs MOUNTPOINT
//
// It needs root, /dev/fuse and an existing directory, prints "ready MOUNTPOINT" once the file can be read, and ends on
// SIGTERM or SIGINT, which frees every blocked process at once. So does any other end of it, SIGKILL included; only the
// dead mount then stays behind, and the next run on the same directory removes it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "stuckfs: "+err.Error())
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) != 1 || args[0] == "" {
		return errors.New("usage: stuckfs MOUNTPOINT")
	}
	if os.Geteuid() != 0 {
		return errors.New("must run as root: it mounts a file system for all users")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		return fmt.Errorf("the kernel's FUSE device is not there (modprobe fuse): %w", err)
	}
	dir, err := filepath.Abs(args[0])
	if err != nil {
		return err
	}
	if err := detachStale(dir); err != nil {
		return err
	}

	if err := mount(dir); err != nil {
		return err
	}
	// From here on the mount is taken away whatever happens; the end of this process closes /dev/fuse, which aborts the
	// connection even where another mount namespace still has the mount.
	connection, err := connectionOf(dir)
	if err != nil {
		return errors.Join(err, detach(dir))
	}
	fmt.Println("ready " + dir)
	<-ctx.Done()
	return errors.Join(abort(connection), detach(dir))
}

// detachStale takes away the mounts that crashed runs left on dir, which must be a directory.
func detachStale(dir string) error {
	for {
		info, err := os.Stat(dir)
		switch {
		case errors.Is(err, unix.ENOTCONN): // transport endpoint is not connected: nobody serves it any more
			if err := detach(dir); err != nil {
				return fmt.Errorf("stale mount: %w", err)
			}
		case err != nil:
			return fmt.Errorf("mount point: %w", err)
		case !info.IsDir():
			return fmt.Errorf("mount point: %s is not a directory", dir)
		default:
			return nil
		}
	}
}

func detach(dir string) error {
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

// connectionOf returns the number under which the kernel lists the connection of the file system mounted on dir: that of
// its device.
func connectionOf(dir string) (uint32, error) {
	var stat unix.Stat_t
	if err := unix.Stat(dir, &stat); err != nil {
		return 0, fmt.Errorf("stat %s: %w", dir, err)
	}
	return unix.Minor(stat.Dev), nil
}

// abort ends all requests of the connection, answered or not, if the kernel's control file system for FUSE is mounted at
// its usual place. If not, the end of this process does the same.
func abort(connection uint32) error {
	err := os.WriteFile(fmt.Sprintf("/sys/fs/fuse/connections/%d/abort", connection), []byte("1"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("abort the connection: %w", err)
	}
	return nil
}
