package webhook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/eni-guard/eni-guard/internal/agent"
	"github.com/eni-guard/eni-guard/internal/mtls"
	"github.com/eni-guard/eni-guard/internal/sandbox"
)

const (
	// answerMargin is how much earlier than the webhook gives up the agent must stop looking, so that what it did find
	// out still arrives.
	answerMargin = 500 * time.Millisecond
	// maxQuestions bounds how many questions one agent is asked at once, and how many connections to it are kept.
	maxQuestions = 8
	// maxIdle bounds the connections to all agents that are kept though nobody asks: each takes some 50 KiB, and a collection
	// delete over a large cluster asks thousands of agents once (test/scale).
	maxIdle = 256
	// maxWaits bounds how many questions wait for the release of pods of one node.
	maxWaits = 16
	// maxReportBytes bounds what is read of an answer.
	maxReportBytes = 1 << 20
)

// agents asks the agents of the nodes, over connections that are kept.
type agents struct {
	http    *http.Client
	port    string
	timeout time.Duration
	// asking joins questions about the same pod that are asked at the same time into one.
	asking singleflight.Group
	// questions and waits bound what one node is asked at once.
	questions, waits nodeSlots
}

func newAgents(port string, timeout time.Duration, certificates mtls.Source) *agents {
	return &agents{
		port:      port,
		timeout:   timeout,
		questions: nodeSlots{limit: maxQuestions},
		waits:     nodeSlots{limit: maxWaits},
		http: &http.Client{
			Transport: &http.Transport{
				DialTLSContext:      mtls.Dialer(certificates, &net.Dialer{Timeout: timeout, KeepAlive: 30 * time.Second}, mtls.AgentName),
				MaxIdleConns:        maxIdle,
				MaxIdleConnsPerHost: maxQuestions,
				IdleConnTimeout:     4 * time.Minute,
			},
			// An agent does not redirect.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
}

// ask asks the agent at a node's address about a pod. An error says, in words that fit behind "the agent of node X",
// why there is no answer; it never means that nothing was found.
func (a *agents) ask(ctx context.Context, address string, query sandbox.Query) (sandbox.Report, error) {
	start := time.Now()
	look := a.timeout - answerMargin
	if deadline, limited := ctx.Deadline(); limited {
		look = min(look, time.Until(deadline)-answerMargin)
	}
	if look <= 0 {
		return sandbox.Report{}, errors.New("could not be asked: no time was left")
	}
	// Whoever asks first may go away; the others still want the answer.
	answer := a.asking.DoChan(fmt.Sprint(address, query), func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), look+answerMargin)
		defer cancel()
		free, err := a.questions.take(ctx, address)
		if err != nil {
			return sandbox.Report{}, err
		}
		defer free()
		return a.post(ctx, address, query, url.Values{"timeout": {look.String()}})
	})
	select {
	case result := <-answer:
		report, _ := result.Val.(sandbox.Report)
		return report, result.Err
	case <-ctx.Done():
		return sandbox.Report{}, transportError(ctx.Err(), a.host(address), time.Since(start))
	}
}

// await asks the agent to answer when the pod is released, or after wait. Such questions take no places from the others; where
// too many wait for a node already, it is a question like any other.
func (a *agents) await(ctx context.Context, address string, query sandbox.Query, wait time.Duration) (sandbox.Report, error) {
	noPatience, cancel := context.WithCancel(ctx)
	cancel()
	free, err := a.waits.take(noPatience, address)
	if err != nil {
		return a.ask(ctx, address, query)
	}
	defer free()
	// It looks last when it has waited.
	ctx, cancel = context.WithTimeout(ctx, wait+a.timeout+answerMargin)
	defer cancel()
	return a.post(ctx, address, query, url.Values{"timeout": {(a.timeout - answerMargin).String()}, "wait": {wait.String()}})
}

func (a *agents) host(address string) string { return net.JoinHostPort(address, a.port) }

// post sends a question until the deadline of ctx.
func (a *agents) post(ctx context.Context, address string, query sandbox.Query, parameters url.Values) (sandbox.Report, error) {
	start := time.Now()
	body, err := json.Marshal(query)
	if err != nil {
		return sandbox.Report{}, err
	}
	host := a.host(address)
	target := url.URL{Scheme: "https", Host: host, Path: agent.InspectPath, RawQuery: parameters.Encode()}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, target.String(), bytes.NewReader(body))
	if err != nil {
		return sandbox.Report{}, err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := a.http.Do(request)
	if err != nil {
		return sandbox.Report{}, transportError(err, host, time.Since(start))
	}
	defer response.Body.Close()
	content, err := io.ReadAll(io.LimitReader(response.Body, maxReportBytes))
	if err != nil {
		return sandbox.Report{}, transportError(err, host, time.Since(start))
	}
	if response.StatusCode != http.StatusOK {
		var refusal struct{ Error string }
		if json.Unmarshal(content, &refusal) != nil || refusal.Error == "" {
			return sandbox.Report{}, fmt.Errorf("answered %s", response.Status)
		}
		return sandbox.Report{}, fmt.Errorf("answered: %s", refusal.Error)
	}
	var report sandbox.Report
	if err := json.Unmarshal(content, &report); err != nil {
		return sandbox.Report{}, fmt.Errorf("gave an answer that cannot be read: %w", err)
	}
	if report.Node != query.Node || report.UID != query.UID {
		return sandbox.Report{}, fmt.Errorf("answered for pod UID %q on node %q", report.UID, report.Node)
	}
	report.Sort()
	return report, nil
}

// nodeSlots bounds how many questions one node is asked at once, so that a node that does not answer cannot use up the
// webhook.
type nodeSlots struct {
	limit int
	mu    sync.Mutex
	nodes map[string]*slots
}

type slots struct {
	semaphore chan struct{}
	users     int
}

// take waits for a place until ctx ends; free gives it back. One that is free is had even if ctx has ended.
func (n *nodeSlots) take(ctx context.Context, node string) (free func(), err error) {
	n.mu.Lock()
	if n.nodes == nil {
		n.nodes = map[string]*slots{}
	}
	s := n.nodes[node]
	if s == nil {
		s = &slots{semaphore: make(chan struct{}, n.limit)}
		n.nodes[node] = s
	}
	s.users++
	n.mu.Unlock()
	leave := func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if s.users--; s.users == 0 {
			delete(n.nodes, node)
		}
	}
	free = func() { <-s.semaphore; leave() }
	select {
	case s.semaphore <- struct{}{}:
		return free, nil
	default:
	}
	select {
	case s.semaphore <- struct{}{}:
		return free, nil
	case <-ctx.Done():
		leave()
		return nil, fmt.Errorf("could not be asked: %d other questions to it have not been answered", n.limit)
	}
}

// transportError says what went wrong between webhook and agent.
func transportError(err error, host string, took time.Duration) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("did not answer within %s at %s", took.Round(100*time.Millisecond), host)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("does not run: nothing listens at %s", host)
	}
	// Without the ports of this very connection, so that the same failure reads the same.
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		err = wrapped.Err
	}
	var operation *net.OpError
	if errors.As(err, &operation) {
		err = operation.Err
	}
	return fmt.Errorf("cannot be reached at %s: %w", host, err)
}
