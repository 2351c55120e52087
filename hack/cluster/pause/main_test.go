package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const patience = 30 * time.Second

func TestReapsOrphansAndEndsOnSignal(t *testing.T) {
	binary := build(t)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			pause := start(t, binary)

			// The shell leaves behind a child that lives until its standard input is closed, and ends itself: the child
			// goes to process 1 of the namespace.
			hold, release, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer release.Close()
			shell := exec.Command("nsenter", "--target", strconv.Itoa(pause.Process.Pid), "--pid", "sh", "-c", "cat <&3 >/dev/null & exit 0")
			shell.ExtraFiles = []*os.File{hold}
			shell.Stderr = os.Stderr // the file itself: the orphan keeps it open, and a pipe would be waited for
			err = shell.Run()
			hold.Close()
			if err != nil {
				t.Fatalf("nsenter: %v", err)
			}
			waitFor(t, "the orphan to become a child of pause", func() bool { return children(t, pause) != "" })
			release.Close()
			waitFor(t, "pause to reap the orphan", func() bool { return children(t, pause) == "" })

			if err := pause.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			if err := pause.Wait(); err != nil {
				t.Fatalf("after %v: %v", sig, err)
			}
		})
	}
}

func build(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test makes process namespaces: run it as root")
	}
	binary := filepath.Join(t.TempDir(), "pause")
	build := exec.Command("go", "build", "-o", binary, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return binary
}

// start runs pause as process 1 of a process namespace, as a runtime does.
func start(t *testing.T, binary string) *exec.Cmd {
	t.Helper()
	pause := exec.Command(binary)
	pause.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID}
	if err := pause.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if pause.ProcessState == nil {
			pause.Process.Kill()
			pause.Wait()
		}
	})
	return pause
}

// children lists the children of all threads of the process, zombies included.
func children(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", cmd.Process.Pid))
	if err != nil || len(lists) == 0 {
		t.Fatalf("no list of children of process %d: %v", cmd.Process.Pid, err)
	}
	var all []string
	for _, list := range lists {
		content, err := os.ReadFile(list)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, strings.Fields(string(content))...)
	}
	return strings.Join(all, " ")
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
