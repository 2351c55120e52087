package main

import (
	"os"
	"runtime"
	"testing"
	"time"
)

const patience = 30 * time.Second

// The main thread stays with the main goroutine. The threads that tests take to other namespaces must end with the test,
// and the main one never does: it would go on holding a namespace, with an address in it.
func init() { runtime.LockOSThread() }

// TestMain makes the test binary be the plugin itself when it is called like one.
func TestMain(m *testing.M) {
	if os.Getenv("CNI_COMMAND") != "" {
		main()
		return
	}
	os.Exit(m.Run())
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
