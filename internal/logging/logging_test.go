package logging

import (
	"bufio"
	"encoding/json"
	stdlog "log"
	"os"
	"testing"
)

// A program that reads the log line by line must be able to read all of them.
func TestTheStandardLibraryLogsJSONToo(t *testing.T) {
	read, write, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr := os.Stderr
	os.Stderr = write
	defer func() { os.Stderr = stderr }()
	if _, err := (&Options{format: "json"}).Logger(); err != nil {
		t.Fatal(err)
	}
	defer stdlog.SetOutput(stderr)
	stdlog.Printf("http: TLS handshake error from %s: EOF", "192.0.2.2:21147")
	if err := write.Close(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(read)
	if !lines.Scan() {
		t.Fatal("nothing was logged")
	}
	var line struct{ Message string }
	if err := json.Unmarshal(lines.Bytes(), &line); err != nil || line.Message != "http: TLS handshake error from 192.0.2.2:21147: EOF" {
		t.Errorf("logged %s (%v)", lines.Bytes(), err)
	}
}
