package webhook

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/go-logr/logr"
)

func TestAReplicaThatIsToldToEndAnswersOn(t *testing.T) {
	told, tell := context.WithCancel(t.Context())
	d := drain{told}
	never := d.over(logr.Discard(), time.Hour)
	over := d.over(logr.Discard(), 0)
	if err := d.ready(nil); err != nil {
		t.Errorf("before it is told: %v", err)
	}
	if over.Err() != nil {
		t.Error("the drain is over before it has begun")
	}
	tell()
	<-over.Done()
	if never.Err() != nil {
		t.Error("the drain is over before its time")
	}
	if d.ready(nil) == nil {
		t.Error("it calls itself ready although it ends")
	}
}

// The API server keeps its connections: it must be told not to.
func TestADrainClosesConnectionsThatAreInUse(t *testing.T) {
	told, tell := context.WithCancel(t.Context())
	server := httptest.NewServer(drain{told}.closing(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if _, err := io.WriteString(w, "answer"); err != nil {
			t.Error(err)
		}
	})))
	defer server.Close()
	closed := func() bool {
		t.Helper()
		response, err := server.Client().Get(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		if body, err := io.ReadAll(response.Body); err != nil || string(body) != "answer" {
			t.Errorf("answered %q (%v)", body, err)
		}
		return response.Close
	}
	if closed() {
		t.Error("the connection is closed before the replica is told to end")
	}
	tell()
	if !closed() {
		t.Error("the connection is kept although the replica ends")
	}
}
