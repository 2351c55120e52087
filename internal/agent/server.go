package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/go-logr/logr"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

const (
	// InspectPath takes a sandbox.Query by POST and answers with a sandbox.Report. The query parameter "timeout", a Go
	// duration, bounds how long the agent may look; what it has not found out by then, the report says. With "wait", a Go
	// duration too, it looks again when something has changed, and answers when the pod is released or the time has passed.
	InspectPath = "/v1/inspect"
	// DefaultPort is where agents listen on their node's address.
	DefaultPort = 9807

	defaultTimeout = 5 * time.Second
	maxTimeout     = 30 * time.Second
	maxQueryBytes  = 64 << 10
)

// errorBody is the answer to a query that cannot be asked.
type errorBody struct {
	Error string `json:"error"`
}

// Handler serves InspectPath. It expects the TLS layer to have authenticated the caller.
func Handler(inspector *Inspector, log logr.Logger) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+InspectPath, func(w http.ResponseWriter, r *http.Request) {
		query, times, status, err := readQuery(w, r, inspector.node)
		if err != nil {
			log.Info("refused a query", "caller", r.RemoteAddr, "status", status, "reason", err.Error())
			writeJSON(w, status, errorBody{err.Error()})
			return
		}
		start := time.Now()
		report := awaitRelease(r.Context(), inspector, query, times)
		log.Info("inspected", "namespace", query.Namespace, "pod", query.Name, "uid", query.UID, "verdict", report.Verdict(),
			"findings", len(report.Findings), "failures", report.Failures(), "took", time.Since(start).String())
		writeJSON(w, http.StatusOK, report)
	})
	return mux
}

// times are how long a caller wants the agent to look, and to wait for the release.
type times struct{ timeout, wait time.Duration }

// readQuery reads and checks a query; status is the HTTP status that goes with an error.
func readQuery(w http.ResponseWriter, r *http.Request, node string) (query sandbox.Query, t times, status int, err error) {
	t.timeout = defaultTimeout
	for name, target := range map[string]*time.Duration{"timeout": &t.timeout, "wait": &t.wait} {
		if text := r.URL.Query().Get(name); text != "" {
			*target, err = time.ParseDuration(text)
			if err != nil || *target <= 0 || *target > maxTimeout {
				return query, t, http.StatusBadRequest, fmt.Errorf("%s %q is not a duration above 0 and up to %s", name, text, maxTimeout)
			}
		}
	}
	decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxQueryBytes))
	if err := decoder.Decode(&query); err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			return query, t, http.StatusRequestEntityTooLarge, fmt.Errorf("the query is larger than %d bytes", tooLarge.Limit)
		}
		return query, t, http.StatusBadRequest, fmt.Errorf("the query is not valid JSON: %w", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return query, t, http.StatusBadRequest, errors.New("the query is followed by something else")
	}
	if err := query.Validate(); err != nil {
		return query, t, http.StatusBadRequest, err
	}
	if query.Node != node {
		return query, t, http.StatusMisdirectedRequest, fmt.Errorf("pod %s/%s is on node %q, this is the agent of node %q", query.Namespace, query.Name, query.Node, node)
	}
	return query, t, http.StatusOK, nil
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	// The caller has gone if this fails: there is nobody left to tell.
	_ = json.NewEncoder(w).Encode(body)
}

// noPod is a UID that no pod has: looking for it runs every probe and must find nothing.
const noPod = "00000000-0000-0000-0000-000000000000"

// goodFor is how long it is enough for the agent's readiness that every probe could look everywhere.
const goodFor = 20 * time.Second

// HealthHandler serves /healthz (the agent runs) and /readyz (every probe can look).
func HealthHandler(inspector *Inspector) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "ok")
	})
	// The kubelet asks every few seconds, and a look at everything has its price: in between, a quick one must do.
	var mu sync.Mutex
	var good time.Time
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		how := quick
		if time.Since(good) > goodFor {
			how = thorough
		}
		ctx, cancel := context.WithTimeout(r.Context(), defaultTimeout)
		defer cancel()
		report := inspector.look(ctx, sandbox.Query{Node: inspector.node, UID: noPod}, how)
		if report.Verdict() != sandbox.Released {
			good = time.Time{}
			writeJSON(w, http.StatusServiceUnavailable, report)
			return
		}
		if how == thorough {
			good = time.Now()
		}
		fmt.Fprintln(w, "ok")
	})
	return mux
}
