// Package reach says in the log what a process needs of others and can or cannot reach.
package reach

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/version"
	"k8s.io/client-go/rest"
)

const (
	// askEvery is the pause between two questions to all targets. There may be thousands of agents, and one API server.
	askEvery = 5 * time.Minute
	// askAgainEvery is the pause while one of them cannot be reached.
	askAgainEvery = 30 * time.Second
	// askTimeout is how long one target may take to answer.
	askTimeout = 5 * time.Second
)

// Target is something that a process needs.
type Target struct {
	// Name is the key it has in the log, such as apiServer.
	Name string
	// Ask returns its version, or why it cannot be reached.
	Ask func(ctx context.Context) (version string, err error)
}

// APIServer is the API server that a client has been made for.
func APIServer(client rest.Interface) Target {
	return Target{"apiServer", func(ctx context.Context) (string, error) {
		content, err := client.Get().AbsPath("/version").Do(ctx).Raw()
		if err != nil {
			return "", err
		}
		var info version.Info
		if err := json.Unmarshal(content, &info); err != nil {
			return "", fmt.Errorf("its version: %w", err)
		}
		return info.GitVersion, nil
	}}
}

// Watch says at once, in one line with the facts, what can be reached, and then, until ctx ends, each time something can no longer be
// reached, or can again. The facts are keys and values.
func Watch(ctx context.Context, log logr.Logger, targets []Target, facts ...any) {
	failing := map[string]bool{}
	for _, t := range targets {
		version, err := t.ask(ctx)
		if failing[t.Name] = err != nil; err != nil {
			version = "not reachable: " + err.Error()
		}
		facts = append(facts, t.Name, version)
	}
	if ctx.Err() == nil {
		log.Info("what this can reach", facts...)
	}
	for {
		pause := askEvery
		if slices.Contains(slices.Collect(maps.Values(failing)), true) {
			pause = askAgainEvery
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
		for _, t := range targets {
			version, err := t.ask(ctx)
			switch {
			case ctx.Err() != nil:
				return
			case err != nil && !failing[t.Name]:
				log.Error(err, "not reachable any more", "what", t.Name)
			case err == nil && failing[t.Name]:
				log.Info("reachable again", "what", t.Name, "version", version)
			}
			failing[t.Name] = err != nil
		}
	}
}

func (t Target) ask(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	return t.Ask(ctx)
}
