package reach

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-logr/logr/funcr"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/rest"
)

func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var lines []string
		log := funcr.New(func(_, line string) { lines = append(lines, line) }, funcr.Options{})
		var runtimeErr error
		targets := []Target{
			{"runtime", func(context.Context) (string, error) { return "containerd 2.4.2", runtimeErr }},
			{"apiServer", func(context.Context) (string, error) { return "", errors.New("connection refused") }},
		}
		ctx, end := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); Watch(ctx, log, targets, "kernel", "6.12") }()
		synctest.Wait()
		for _, step := range []struct {
			name string
			err  error
			want []string
		}{
			{"at the start", nil, []string{`"level"=0 "msg"="what this can reach" "kernel"="6.12" "runtime"="containerd 2.4.2" "apiServer"="not reachable: connection refused"`}},
			{"nothing changes", nil, nil},
			{"the runtime goes", errors.New("down"), []string{`"msg"="not reachable any more" "error"="down" "what"="runtime"`}},
			{"it stays away", errors.New("still down"), nil},
			{"it comes back", nil, []string{`"level"=0 "msg"="reachable again" "what"="runtime" "version"="containerd 2.4.2"`}},
		} {
			runtimeErr = step.err
			if step.name != "at the start" {
				<-time.After(askEvery)
				synctest.Wait()
			}
			if !slices.Equal(lines, step.want) {
				t.Errorf("%s: got %q, want %q", step.name, lines, step.want)
			}
			lines = nil
		}
		end()
		<-ended
	})
}

func TestAPIServer(t *testing.T) {
	answer := `{"gitVersion":"v1.36.3"}`
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/version" {
			t.Errorf("asked for %s", r.URL)
		}
		_, _ = w.Write([]byte(answer))
	}))
	client, err := discovery.NewDiscoveryClientForConfig(&rest.Config{Host: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	target := APIServer(client.RESTClient())
	if got, err := target.ask(t.Context()); err != nil || got != "v1.36.3" {
		t.Errorf("got %q, %v", got, err)
	}
	answer = "garbage"
	if got, err := target.ask(t.Context()); err == nil {
		t.Errorf("of garbage: got %q", got)
	}
	server.Close()
	if got, err := target.ask(t.Context()); err == nil {
		t.Errorf("without a server: got %q", got)
	}
}

// What is there is asked rarely, because of the many who ask; what is away, more often.
func TestHowOftenWatchAsks(t *testing.T) {
	for _, test := range []struct {
		err  error
		asks int
	}{{nil, 2}, {errors.New("down"), 11}} {
		synctest.Test(t, func(t *testing.T) {
			asks := 0
			ctx, end := context.WithTimeout(t.Context(), askEvery+time.Second)
			defer end()
			Watch(ctx, funcr.New(func(_, _ string) {}, funcr.Options{}), []Target{{"apiServer", func(context.Context) (string, error) { asks++; return "v1", test.err }}})
			if asks != test.asks {
				t.Errorf("with %v: asked %d times in %s, not %d", test.err, asks, askEvery, test.asks)
			}
		})
	}
}
