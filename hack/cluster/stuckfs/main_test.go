package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	patience = 30 * time.Second

	// runEnv makes the test binary be the command itself.
	runEnv = "STUCKFS_TEST_RUN"

	fusectl = "/sys/fs/fuse/connections"
	nobody  = 65534
)

func TestMain(m *testing.M) {
	if os.Getenv(runEnv) != "" {
		main()
		return
	}
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "these tests mount file systems: run them as root")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func TestKilledReadersStayUntilTheEnd(t *testing.T) {
	for name, withControl := range map[string]bool{"abort through fusectl": true, "without fusectl": false} {
		t.Run(name, func(t *testing.T) {
			privateMounts(t)
			unix.Unmount(fusectl, unix.MNT_DETACH) // not mounted: fine
			if withControl {
				if err := unix.Mount("fusectl", fusectl, "fusectl", 0, ""); err != nil {
					t.Fatal(err)
				}
			}
			dir := mountPoint(t)
			stuck := start(t, dir)

			// More readers than a FUSE server has threads of its own, the last one of another user.
			var readers []*exec.Cmd
			for i := range 20 {
				var as *syscall.SysProcAttr
				if i == 19 {
					as = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
				}
				readers = append(readers, killedReader(t, filepath.Join(dir, fileName), as))
			}

			// All else is still answered.
			entries, err := os.ReadDir(dir)
			if err != nil || len(entries) != 1 || entries[0].Name() != fileName {
				t.Errorf("directory: %v, %v", entries, err)
			}
			for path, want := range map[string]os.FileMode{dir: os.ModeDir | 0o555, filepath.Join(dir, fileName): 0o444} {
				info, err := os.Stat(path)
				if err != nil {
					t.Fatal(err)
				}
				if info.Mode() != want {
					t.Errorf("%s: mode %s, want %s", path, info.Mode(), want)
				}
			}
			for _, reader := range readers {
				if got := state(t, reader); got != "D" {
					t.Errorf("killed reader %d: state %s, want D", reader.Process.Pid, got)
				}
			}

			stop(t, stuck)
			for _, reader := range readers {
				if err := wait(t, reader); !killed(err) {
					t.Errorf("reader %d ended with %v, want killed", reader.Process.Pid, err)
				}
			}
			if mounted(t, dir) {
				t.Errorf("%s is still mounted", dir)
			}
		})
	}
}

// killedReader returns a process that was killed while it read file, and is in state D. One whose request the server has not taken yet just
// ends when it is killed: then it is another one.
func killedReader(t *testing.T, file string, as *syscall.SysProcAttr) *exec.Cmd {
	t.Helper()
	for {
		reader := exec.Command("cat", file)
		reader.SysProcAttr = as
		if err := reader.Start(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "a reader to sleep in the read", func() bool {
			return state(t, reader) == "S" && proc(t, reader, "wchan") == "request_wait_answer" && reads(t, reader)
		})
		if err := reader.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		ended := false
		waitFor(t, "the killed reader to be in state D, or to end", func() bool {
			ended = state(t, reader) == "Z"
			return ended || state(t, reader) == "D" && !exits(t, reader)
		})
		if !ended {
			return reader
		}
		if err := wait(t, reader); !killed(err) {
			t.Fatalf("reader %d ended with %v, want killed", reader.Process.Pid, err)
		}
	}
}

func TestStaleMountIsRemoved(t *testing.T) {
	privateMounts(t)
	dir := mountPoint(t)
	for range 2 { // the second run finds the mount of the first
		crashed := start(t, dir)
		crashed.Process.Kill()
		wait(t, crashed)
		if _, err := os.Stat(dir); !errors.Is(err, unix.ENOTCONN) {
			t.Fatalf("after the crash: %v, want %v", err, unix.ENOTCONN)
		}
	}
	stop(t, start(t, dir))
	if mounted(t, dir) {
		t.Errorf("%s is still mounted", dir)
	}
}

func TestRefuses(t *testing.T) {
	tests := []struct {
		name    string
		args    []string
		prepare func(*testing.T, *exec.Cmd)
		want    string
	}{
		{name: "no argument", want: "usage: stuckfs MOUNTPOINT"},
		{name: "two arguments", args: []string{"/a", "/b"}, want: "usage: stuckfs MOUNTPOINT"},
		{name: "missing directory", args: []string{"/nonexistent"}, want: "mount point: stat /nonexistent: no such file or directory"},
		{name: "a file", args: []string{"/etc/hostname"}, want: "mount point: /etc/hostname is not a directory"},
		{name: "not root", args: []string{"/mnt"}, want: "must run as root", prepare: func(_ *testing.T, cmd *exec.Cmd) {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		}},
		{name: "no /dev/fuse", args: []string{"/mnt"}, want: "stat /dev/fuse: no such file or directory", prepare: func(t *testing.T, _ *exec.Cmd) {
			if err := unix.Mount("none", "/dev", "tmpfs", 0, ""); err != nil {
				t.Fatal(err)
			}
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			privateMounts(t)
			cmd := command(test.args...)
			cmd.Stdin = os.Stdin // or else /dev/null would be opened
			if test.prepare != nil {
				test.prepare(t, cmd)
			}
			output, err := cmd.CombinedOutput()
			if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 {
				t.Errorf("ended with %v, want code 1", err)
			}
			if text := string(output); strings.Count(text, "\n") != 1 || !strings.HasPrefix(text, "stuckfs: ") || !strings.Contains(text, test.want) {
				t.Errorf("output %q, want one line with %q", text, test.want)
			}
		})
	}
}

// privateMounts gives the test, and the processes it starts, mounts of their own: nothing stays behind, whatever happens.
// The thread is not given back: it ends with the test.
func privateMounts(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		t.Fatalf("unshare: %v", err)
	}
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatalf("make mounts private: %v", err)
	}
}

// mountPoint makes a directory that every user can reach, unlike those of t.TempDir.
func mountPoint(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "stuckfs-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for unix.Unmount(dir, unix.MNT_DETACH) == nil {
		}
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func command(args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), runEnv+"=1")
	return cmd
}

// start runs stuckfs on dir and waits for its line.
func start(t *testing.T, dir string) *exec.Cmd {
	t.Helper()
	cmd := command(dir)
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			cmd.Process.Kill()
			cmd.Wait()
		}
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || line != "ready "+dir+"\n" {
		t.Fatalf("stuckfs printed %q, %v", line, err)
	}
	return cmd
}

// stop ends stuckfs with SIGTERM and expects code 0.
func stop(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := wait(t, cmd); err != nil {
		t.Fatalf("stuckfs ended with %v", err)
	}
}

// wait is cmd.Wait with a limit.
func wait(t *testing.T, cmd *exec.Cmd) error {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		return err
	case <-time.After(patience):
		t.Fatalf("waited %s for the end of process %d, state %s", patience, cmd.Process.Pid, state(t, cmd))
		return nil
	}
}

func killed(err error) bool {
	exit := (*exec.ExitError)(nil)
	return errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
}

// reads says whether the process is in a system call that reads; to open a file, and to ask for its size, are requests too, which are
// answered.
func reads(t *testing.T, cmd *exec.Cmd) bool {
	t.Helper()
	call, _, _ := strings.Cut(proc(t, cmd, "syscall"), " ") // "running", or its number first (proc_pid_syscall(5))
	return call == strconv.Itoa(unix.SYS_READ) || call == strconv.Itoa(unix.SYS_COPY_FILE_RANGE)
}

// state returns the letter of the process in /proc/PID/stat.
func state(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	return stat(t, cmd)[0]
}

// exits says whether the process is on its way out. It closes its files then, which is a request too, and waits in state D for the answer.
func exits(t *testing.T, cmd *exec.Cmd) bool {
	t.Helper()
	const exiting = 0x4 // PF_EXITING (include/linux/sched.h)
	flags, err := strconv.ParseUint(stat(t, cmd)[6], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return flags&exiting != 0
}

// stat returns the fields of /proc/PID/stat from the state on.
func stat(t *testing.T, cmd *exec.Cmd) []string {
	t.Helper()
	all := proc(t, cmd, "stat")
	return strings.Fields(all[strings.LastIndex(all, ")")+1:]) // the name before it may hold anything
}

func proc(t *testing.T, cmd *exec.Cmd, file string) string {
	t.Helper()
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", cmd.Process.Pid, file))
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// mounted reports whether anything is mounted on dir, for the test's own thread.
func mounted(t *testing.T, dir string) bool {
	t.Helper()
	mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return slices.Contains(strings.Fields(string(mounts)), dir)
}

func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	deadline := time.After(patience)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-deadline:
			t.Fatalf("waited %s for %s", patience, what)
		case <-tick.C:
		}
	}
}
