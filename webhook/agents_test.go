package webhook

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/eni-guard/eni-guard/internal/agent"
	"github.com/eni-guard/eni-guard/internal/mtls"
	"github.com/eni-guard/eni-guard/internal/mtls/mtlstest"
	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// startAgent serves handler as an agent does, and returns a client for it and its address.
func startAgent(t *testing.T, timeout time.Duration, handler http.HandlerFunc) (*agents, string, *atomic.Int32) {
	t.Helper()
	authority := mtlstest.NewAuthority(t)
	serverDir, clientDir := t.TempDir(), t.TempDir()
	authority.Issue(t, serverDir, mtls.AgentName, time.Hour)
	authority.Issue(t, clientDir, mtls.WebhookName, time.Hour)
	server := httptest.NewUnstartedServer(handler)
	server.TLS = mtls.Server(mtls.Dir(serverDir), mtls.WebhookName)
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	var connections atomic.Int32
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}
	server.StartTLS()
	t.Cleanup(server.Close)
	target, err := url.Parse(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	a := newAgents(target.Port(), timeout, mtls.Dir(clientDir))
	t.Cleanup(a.http.CloseIdleConnections)
	return a, target.Hostname(), &connections
}

var webQuery = query(runningPod())

func TestAskReadsTheReport(t *testing.T) {
	a, address, connections := startAgent(t, 5*time.Second, func(w http.ResponseWriter, r *http.Request) {
		var query sandbox.Query
		if err := json.NewDecoder(r.Body).Decode(&query); err != nil || query.UID != webQuery.UID || r.URL.Path != agent.InspectPath || r.Method != http.MethodPost {
			t.Errorf("asked %s %s for %+v (%v)", r.Method, r.URL, query, err)
		}
		if timeout, err := time.ParseDuration(r.URL.Query().Get("timeout")); err != nil || timeout <= 0 || timeout > 4500*time.Millisecond {
			t.Errorf("the agent may look for %s (%v)", timeout, err)
		}
		_ = json.NewEncoder(w).Encode(allProbes(stuck()...))
	})
	const questions = 10
	for range questions {
		report, err := a.ask(t.Context(), address, webQuery)
		if err != nil || report.Verdict() != sandbox.Bound || len(report.Findings) != len(stuck()) {
			t.Fatalf("got %+v, %v", report, err)
		}
	}
	// One that its writer has not put down in time is not used again (maxWriteWaitBeforeConnReuse in net/http).
	if n := connections.Load(); n > questions/2 {
		t.Errorf("%d connections for %d questions", n, questions)
	}
}

func TestAskWithoutAUsableAnswer(t *testing.T) {
	for _, test := range []struct {
		name    string
		handler http.HandlerFunc
		want    string
	}{
		{"refused", func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusMisdirectedRequest)
			fmt.Fprint(w, `{"error":"this is the agent of node \"node-b\""}`)
		}, `answered: this is the agent of node "node-b"`},
		{"an error page", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "oops", http.StatusBadGateway) }, "answered 502 Bad Gateway"},
		{"a redirect", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/elsewhere", http.StatusFound) }, "answered 302 Found"},
		{"not JSON", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "fine!") }, "gave an answer that cannot be read"},
		{"cut off", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "1000")
			fmt.Fprint(w, `{"node":`)
		}, "unexpected EOF"},
		{"about another pod", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{"node":"node-a","uid":"other"}`) }, `answered for pod UID "other"`},
		{"of another node", func(w http.ResponseWriter, _ *http.Request) {
			report := allProbes()
			report.Node = "node-b"
			_ = json.NewEncoder(w).Encode(report)
		}, `on node "node-b"`},
		{"an empty object", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, `{}`) }, `answered for pod UID ""`},
		{"endless", func(w http.ResponseWriter, _ *http.Request) {
			for range 2 << 10 {
				if _, err := w.Write(make([]byte, 1<<10)); err != nil {
					return
				}
			}
		}, "gave an answer that cannot be read"},
	} {
		t.Run(test.name, func(t *testing.T) {
			a, address, _ := startAgent(t, 5*time.Second, test.handler)
			report, err := a.ask(t.Context(), address, webQuery)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
			if report.Verdict() != sandbox.Unknown {
				t.Errorf("verdict %s", report.Verdict())
			}
		})
	}
}

func TestAskASilentAgent(t *testing.T) {
	released := make(chan struct{})
	var once sync.Once
	a, address, _ := startAgent(t, time.Second, func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-released:
		case <-r.Context().Done():
		}
	})
	t.Cleanup(func() { once.Do(func() { close(released) }) })
	_, err := a.ask(t.Context(), address, webQuery)
	if err == nil || !strings.HasPrefix(err.Error(), "did not answer within ") {
		t.Errorf("got %v", err)
	}
}

func TestAskWhereNobodyListens(t *testing.T) {
	a, address, _ := startAgent(t, time.Second, nil)
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", net.JoinHostPort(address, "0"))
	if err != nil {
		t.Fatal(err)
	}
	_, a.port, err = net.SplitHostPort(listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = a.ask(t.Context(), address, webQuery)
	if want := "does not run: nothing listens at " + net.JoinHostPort(address, a.port); err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// However many ask about one pod at the same time, the agent is asked once, and all get its answer; who gives up does not
// take the answer from the others.
func TestConcurrentQuestionsAboutOnePodAreOne(t *testing.T) {
	var asked atomic.Int32
	answer, first, second := make(chan struct{}), make(chan struct{}), make(chan struct{}, 50)
	a, address, _ := startAgent(t, 20*time.Second, func(w http.ResponseWriter, _ *http.Request) {
		if asked.Add(1) == 1 {
			close(first)
		} else {
			second <- struct{}{}
		}
		<-answer
		_ = json.NewEncoder(w).Encode(allProbes(stuck()...))
	})
	impatient, giveUp := context.WithCancel(t.Context())
	gaveUp := make(chan error)
	go func() {
		_, err := a.ask(impatient, address, webQuery)
		gaveUp <- err
	}()
	<-first
	var all, started sync.WaitGroup
	started.Add(50)
	for range 50 {
		all.Go(func() {
			started.Done()
			report, err := a.ask(t.Context(), address, webQuery)
			if err != nil || report.Verdict() != sandbox.Bound {
				t.Errorf("got %s, %v", report.Verdict(), err)
			}
		})
	}
	started.Wait()
	giveUp()
	if err := <-gaveUp; err == nil {
		t.Error("who gave up got an answer")
	}
	// Without an answer to the first, a second question would arrive now.
	select {
	case <-second:
		t.Error("the agent was asked again")
	case <-time.After(100 * time.Millisecond):
	}
	close(answer)
	all.Wait()
}

// A node that does not answer keeps a bounded number of questions waiting, and does not keep another one's from being
// asked.
func TestASilentNodeTakesNoMoreThanItsPlaces(t *testing.T) {
	var waiting atomic.Int32
	silent, full, more := make(chan struct{}), make(chan struct{}), make(chan struct{})
	a, address, _ := startAgent(t, 5*time.Second, func(_ http.ResponseWriter, r *http.Request) {
		switch waiting.Add(1) {
		case maxQuestions:
			close(full)
		case maxQuestions + 1:
			close(more)
		}
		select {
		case <-silent:
		case <-r.Context().Done():
		}
	})
	defer close(silent)
	var crowd sync.WaitGroup
	noPlace := fmt.Sprintf("%d other questions to it have not been answered", maxQuestions)
	for i := range 3 * maxQuestions {
		crowd.Go(func() {
			query := webQuery
			query.UID = fmt.Sprint(i)
			_, err := a.ask(t.Context(), address, query)
			if err == nil || !strings.Contains(err.Error(), noPlace) && !strings.Contains(err.Error(), "did not answer within") {
				t.Errorf("got %v", err)
			}
		})
	}
	<-full
	impatient, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := a.questions.take(impatient, address); err == nil || !strings.Contains(err.Error(), noPlace) {
		t.Errorf("one question too many: %v", err)
	}
	other, err := a.questions.take(t.Context(), "192.0.2.8")
	if err != nil {
		t.Fatal(err)
	}
	other()
	// Without a bound, the others would arrive now.
	select {
	case <-more:
		t.Errorf("%d questions reached the agent at once", waiting.Load())
	case <-time.After(200 * time.Millisecond):
	}
	crowd.Wait()
	if len(a.questions.nodes) != 0 {
		t.Errorf("%d nodes are remembered", len(a.questions.nodes))
	}
}

// A question that waits for the release says so, and takes no place from those that do not.
func TestAwait(t *testing.T) {
	a, address, _ := startAgent(t, 5*time.Second, func(w http.ResponseWriter, r *http.Request) {
		if got := r.URL.Query().Encode(); got != "timeout=4.5s&wait=20s" {
			t.Errorf("asked with %s", got)
		}
		_ = json.NewEncoder(w).Encode(allProbes())
	})
	for range maxQuestions {
		if _, err := a.questions.take(t.Context(), address); err != nil {
			t.Fatal(err)
		}
	}
	report, err := a.await(t.Context(), address, webQuery, 20*time.Second)
	if err != nil || report.Verdict() != sandbox.Released {
		t.Errorf("got %s, %v", report.Verdict(), err)
	}
}

// Where as many as may are waiting for a node, one more is asked and answered like any question.
func TestTooManyWaitsAreQuestions(t *testing.T) {
	a, address, _ := startAgent(t, 5*time.Second, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Has("wait") {
			t.Errorf("asked with %s", r.URL.RawQuery)
		}
		_ = json.NewEncoder(w).Encode(allProbes(stuck()...))
	})
	for range maxWaits {
		if _, err := a.waits.take(t.Context(), address); err != nil {
			t.Fatal(err)
		}
	}
	if report, err := a.await(t.Context(), address, webQuery, 20*time.Second); err != nil || report.Verdict() != sandbox.Bound {
		t.Errorf("got %s, %v", report.Verdict(), err)
	}
}
