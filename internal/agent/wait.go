package agent

import (
	"context"
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

const (
	// lookAgainAfter and lookAgainAtMost are the pause between two looks while the caller waits: it doubles from one to the
	// other. When the kernel or the runtime tells of a change it ends, but not before the first of the two: on some nodes
	// something changes all the time.
	lookAgainAfter  = 100 * time.Millisecond
	lookAgainAtMost = 2 * time.Second
	// settleTime is how long a look waits after a change: one seldom comes alone.
	settleTime = 20 * time.Millisecond
	// maxWatched bounds the processes whose end is waited for.
	maxWatched = 64
)

// awaitRelease looks once, or, if the caller waits, until the pod is released, the time has passed or the caller has gone. A look that has begun
// by then has its own time: cut short, it would know less than the one before.
func awaitRelease(ctx context.Context, inspector *Inspector, query sandbox.Query, t times) sandbox.Report {
	end := time.Now().Add(t.wait)
	look := func() sandbox.Report {
		ctx, cancel := context.WithTimeout(ctx, t.timeout)
		defer cancel()
		return inspector.Inspect(ctx, query)
	}
	report := look()
	if t.wait == 0 || report.Verdict() == sandbox.Released {
		return report
	}
	waiting, cancel := context.WithDeadline(ctx, end)
	defer cancel()
	w := newWatch(waiting, inspector.runtime.events(waiting))
	defer w.close()
	// What has changed since the last look the watch does not know: the second one comes soon in any case.
	for pause := lookAgainAfter; ; {
		pause = nextPause(pause, w.await(processes(report), pause))
		if waiting.Err() != nil {
			return report
		}
		if report = look(); report.Verdict() == sandbox.Released {
			return report
		}
	}
}

// nextPause is the pause after another one, which a change may have ended.
func nextPause(pause time.Duration, changed bool) time.Duration {
	if changed {
		return lookAgainAfter
	}
	return min(2*pause, lookAgainAtMost)
}

// processes are those that a report has found.
func processes(report sandbox.Report) []int {
	var pids []int
	for _, f := range report.Findings {
		if f.Process != nil && len(pids) < maxWatched {
			pids = append(pids, f.Process.PID)
		}
	}
	return pids
}

// watch waits for changes on the node: the end of processes, mounts that come and go, network namespaces among them, and
// events of the runtime. Where the kernel cannot tell, waiting lasts until its limit.
type watch struct {
	// wake is written to at an event of the runtime, and left when nobody waits any more; mounts is the mount table.
	wake, left, mounts int
	stop               func()
}

// newWatch returns a watch for as long as ctx lasts.
func newWatch(ctx context.Context, events <-chan struct{}) *watch {
	w := &watch{wake: -1, left: -1, mounts: -1} // poll takes no notice of these
	for _, fd := range []*int{&w.wake, &w.left} {
		if event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err == nil {
			*fd = event
		}
	}
	if fd, err := unix.Open("/proc/thread-self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
		w.mounts = fd
	}
	ctx, cancel := context.WithCancel(ctx)
	var forwarding sync.WaitGroup
	forwarding.Go(func() {
		one := []byte{1, 0, 0, 0, 0, 0, 0, 0}
		for {
			select {
			case <-events:
				_, _ = unix.Write(w.wake, one)
			case <-ctx.Done():
				_, _ = unix.Write(w.left, one)
				return
			}
		}
	})
	w.stop = func() { cancel(); forwarding.Wait() }
	return w
}

func (w *watch) close() {
	w.stop()
	for _, fd := range []int{w.wake, w.left, w.mounts} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// await returns true after a change, and false when limit has passed or nobody waits any more. A process that has ended
// already is a change.
func (w *watch) await(pids []int, limit time.Duration) (changed bool) {
	// The kernel tells of a changed mount table by an error condition (man 5 proc_pid_mounts).
	start := time.Now()
	watched := []unix.PollFd{
		{Fd: int32(w.left), Events: unix.POLLIN}, {Fd: int32(w.wake), Events: unix.POLLIN}, {Fd: int32(w.mounts), Events: unix.POLLPRI}, //nolint:gosec // file descriptors
	}
	defer func() {
		for _, process := range watched[3:] {
			_ = unix.Close(int(process.Fd))
		}
	}()
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if errors.Is(err, unix.ESRCH) {
			limit, changed = 0, true
		}
		if err == nil {
			watched = append(watched, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}) //nolint:gosec // a file descriptor
		}
	}
	if ready(watched, limit) || changed {
		changed = true
		var count [8]byte
		_, _ = unix.Read(w.wake, count[:])
		ready(watched[:1], max(settleTime, lookAgainAfter-time.Since(start))) // ends at once when nobody waits any more
	}
	return changed
}

// ready waits until one of the files is, or limit has passed.
func ready(files []unix.PollFd, limit time.Duration) bool {
	for end := time.Now().Add(limit); ; {
		n, err := unix.Poll(files, max(0, int(time.Until(end).Milliseconds())))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil: // it cannot tell, and has not waited
			<-time.After(time.Until(end))
			return false
		}
		return n > 0
	}
}

// kernelFacts tell, as keys and values for the log, which kernel this is, and how the end of processes is waited for on it.
func kernelFacts() []any {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return []any{"kernel", "unknown: " + err.Error()}
	}
	ends := "pidfd"
	if fd, err := unix.PidfdOpen(unix.Getpid(), 0); err != nil {
		ends = "asking every " + lookAgainAtMost.String() + ": pidfd_open: " + err.Error()
	} else {
		_ = unix.Close(fd)
	}
	return []any{"kernel", unix.ByteSliceToString(name.Release[:]), "endOfProcesses", ends}
}
