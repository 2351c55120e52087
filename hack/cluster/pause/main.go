// Command pause is the main process of a pod's sandbox: it keeps the namespaces open until it is told to end, and reaps
// the processes that it inherits as process 1 of a shared process namespace.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	// Two channels: a burst of ended children must not push out the signal to end.
	end, child := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGINT, syscall.SIGTERM)
	signal.Notify(child, syscall.SIGCHLD)
	for {
		reap()
		select {
		case <-end:
			return
		case <-child:
		}
	}
}

// reap collects every child that has ended: one SIGCHLD may stand for several.
func reap() {
	for {
		pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || pid == 0 { // no child at all, or none that has ended
			return
		}
	}
}
