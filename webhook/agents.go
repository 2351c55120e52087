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
	"syscall"
	"time"

	"github.com/eni-guard/eni-guard/internal/agent"
	"github.com/eni-guard/eni-guard/internal/mtls"
	"github.com/eni-guard/eni-guard/internal/sandbox"
)

const (
	// answerMargin is how much earlier than the webhook gives up the agent must stop looking, so that what it did find
	// out still arrives.
	answerMargin = 500 * time.Millisecond
	// maxReportBytes bounds what is read of an answer.
	maxReportBytes = 1 << 20
)

// agents asks the agents of the nodes, over connections that are kept.
type agents struct {
	http    *http.Client
	port    string
	timeout time.Duration
}

func newAgents(port string, timeout time.Duration, certificates mtls.Dir) *agents {
	return &agents{
		port:    port,
		timeout: timeout,
		http: &http.Client{
			Transport: &http.Transport{
				DialTLSContext:      certificates.Dialer(&net.Dialer{Timeout: timeout, KeepAlive: 30 * time.Second}, mtls.AgentName),
				MaxIdleConnsPerHost: 4,
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
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	deadline, _ := ctx.Deadline()
	start := time.Now()
	look := time.Until(deadline) - answerMargin
	if look <= 0 {
		return sandbox.Report{}, errors.New("could not be asked: no time was left")
	}
	body, err := json.Marshal(query)
	if err != nil {
		return sandbox.Report{}, err
	}
	host := net.JoinHostPort(address, a.port)
	target := url.URL{Scheme: "https", Host: host, Path: agent.InspectPath, RawQuery: url.Values{"timeout": {look.String()}}.Encode()}
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

// transportError says what went wrong between webhook and agent.
func transportError(err error, host string, took time.Duration) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("did not answer within %s at %s", took.Round(100*time.Millisecond), host)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("does not run: nothing listens at %s", host)
	}
	var wrapped *url.Error
	if errors.As(err, &wrapped) {
		err = wrapped.Err
	}
	return fmt.Errorf("cannot be reached at %s: %w", host, err)
}
