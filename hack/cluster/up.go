package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	componentTimeout = 60 * time.Second
	nodeTimeout      = 60 * time.Second
)

// prepare gets everything the cluster needs onto this machine and starts nothing.
func prepare(ctx context.Context, cfg config) error {
	if err := installPackages(ctx, hostTools); err != nil {
		return err
	}
	return buildTools(ctx, cfg)
}

// up starts the cluster, after removing what is left of one that was interrupted or has died in part.
func up(ctx context.Context, cfg config) error {
	if err := requireRoot(); err != nil {
		return err
	}
	if err := cfg.validateUp(); err != nil {
		return err
	}
	state, err := readHostState()
	switch {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return err
	default:
		dead := state.dead(ctx)
		if dead == "" {
			return state.sameAs(cfg)
		}
		say("%s of the cluster of %s does not work: starting a new, empty cluster (`make install` puts the guard into it)", dead, state.Config.Repo)
		if err := down(ctx); err != nil {
			return err
		}
	}
	if err := prepare(ctx, cfg); err != nil {
		return err
	}
	start := time.Now()
	if err := startCluster(ctx, cfg); err != nil {
		return fmt.Errorf("%w\n(logs: %s; `make cluster-down` removes what was started, and so does the next `make cluster-up`)", err, cfg.path("logs"))
	}
	say("Kubernetes v%s is up after %s; kubeconfig: %s", cfg.kubernetes, time.Since(start).Round(time.Second), cfg.kubeconfig())
	return nil
}

func startCluster(ctx context.Context, cfg config) error {
	if err := checkFree(ctx, stages(cfg)); err != nil {
		return err
	}
	for _, dir := range []string{"logs", "config", "pki", "images"} {
		if err := os.RemoveAll(cfg.path(dir)); err != nil {
			return err
		}
		if err := os.MkdirAll(cfg.path(dir), 0o755); err != nil {
			return err
		}
	}
	audit, err := filepath.Glob(cfg.path("audit*.log"))
	if err != nil {
		return err
	}
	for _, log := range audit {
		if err := os.Remove(log); err != nil {
			return err
		}
	}
	if err := prepareHost(cfg); err != nil {
		return err
	}
	if err := writeConfiguration(cfg); err != nil {
		return err
	}
	for i, stage := range stages(cfg) {
		if err := startStage(ctx, cfg, stage); err != nil {
			return err
		}
		if i == 0 {
			if err := loadNodeImages(ctx, cfg); err != nil {
				return err
			}
		}
	}
	say("waiting for node %s", nodeName)
	// The controllers are through with their first round once a namespace has its service account.
	for _, args := range [][]string{
		{"wait", "--for=condition=Ready", "node/" + nodeName, "--timeout=10s"},
		{"wait", "--for=create", "serviceaccount/default", "--timeout=10s"},
	} {
		err := waitFor(ctx, nodeTimeout, "the cluster (kubectl "+strings.Join(args, " ")+")", func() error {
			out, err := exec.CommandContext(ctx, cfg.binary("kubectl"), append([]string{"--kubeconfig", cfg.kubeconfig()}, args...)...).CombinedOutput()
			if err != nil {
				return errors.New(lastLines(string(out), 1))
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// checkFree refuses to start where another program, or another Kubernetes, has what this cluster needs.
func checkFree(ctx context.Context, stages [][]component) error {
	for _, stage := range stages {
		for _, c := range stage {
			for _, port := range c.ports {
				// The daemons listen on loopback or on the node's address, which does not exist yet.
				l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort("", strconv.Itoa(port)))
				if err != nil {
					return fmt.Errorf("port %d, which %s needs, is taken: another program listens on it (`ss -ltnp sport = :%d` names it)", port, c.name, port)
				}
				if err := l.Close(); err != nil {
					return err
				}
			}
		}
	}
	for _, table := range proxyTables {
		if exec.CommandContext(ctx, "nft", append([]string{"list", "table"}, table...)...).Run() == nil {
			return fmt.Errorf("this machine has an nftables table %q already: a kube-proxy that is not ours works here", strings.Join(table, " "))
		}
	}
	return nil
}

// startStage starts the daemons of a stage together and waits until each is ready.
func startStage(ctx context.Context, cfg config, stage []component) error {
	type running struct {
		component
		exited chan error
	}
	var all []running
	for _, c := range stage {
		say("starting %s", c.name)
		exited, err := startDaemon(cfg, c)
		if err != nil {
			return fmt.Errorf("starting %s: %w", c.name, err)
		}
		all = append(all, running{c, exited})
	}
	for _, c := range all {
		err := waitFor(ctx, componentTimeout, c.name+" to become ready", func() error {
			select {
			case err := <-c.exited:
				return final{fmt.Errorf("%s has ended (%w)", c.name, err)}
			default:
				return c.check(ctx)
			}
		})
		if err != nil {
			log, _ := os.ReadFile(cfg.logFile(c.name))
			return fmt.Errorf("%w; the end of its log:\n%s", err, lastLines(string(log), 5))
		}
	}
	return nil
}

func (c *config) logFile(component string) string {
	return filepath.Join(c.path("logs"), component+".log")
}

// startDaemon starts a component in a session of its own, so that it outlives this command and its terminal.
func startDaemon(cfg config, c component) (exited chan error, err error) {
	log, err := os.OpenFile(cfg.logFile(c.name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(c.path, c.args...) //nolint:noctx // outlives this command
	cmd.Dir = dataDir
	cmd.Env = append(os.Environ(), processMark)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	exited = make(chan error, 1)
	go func() {
		err := cmd.Wait()
		if err == nil {
			err = errors.New("exit status 0")
		}
		exited <- err
	}()
	return exited, nil
}

// probe asks for health only: the certificates of the controller manager and the scheduler are self-signed, and
// nothing secret is sent.
var probe = http.Client{
	Timeout:   2 * time.Second,
	Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}, //nolint:gosec // see above
}

func (c component) check(ctx context.Context) error {
	if c.ready == "" {
		return nil
	}
	if strings.HasPrefix(c.ready, "/") {
		_, err := os.Stat(c.ready)
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.ready, nil)
	if err != nil {
		return final{err}
	}
	response, err := probe.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s", c.ready, response.Status)
	}
	return nil
}

// final marks an error that no waiting will mend.
type final struct{ error }

func (f final) Unwrap() error { return f.error }

// waitFor tries a condition until it holds, the time is up, or it fails for good.
func waitFor(ctx context.Context, timeout time.Duration, what string, condition func() error) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := condition()
		var end final
		if err == nil || errors.As(err, &end) {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waited %s for %s: %w", timeout, what, err)
		case <-tick.C:
		}
	}
}

// say tells the person at the terminal what happens.
func say(format string, args ...any) {
	fmt.Fprintf(os.Stdout, "cluster: "+format+"\n", args...)
}
