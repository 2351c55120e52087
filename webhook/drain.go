package webhook

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/go-logr/logr"
)

// drainTime is how long a replica that has been told to end goes on answering. It must be longer than the news that the
// replica is no longer an endpoint of the Service takes to every control plane node, and together with the time in which the
// manager stops shorter than the pod's terminationGracePeriodSeconds, 30 seconds.
const drainTime = 10 * time.Second

// drain lets a replica end without a lost call.
type drain struct {
	// told ends when the replica is told to end.
	told context.Context
}

// over returns a context that ends the given time after the replica was told to end.
func (d drain) over(log logr.Logger, after time.Duration) context.Context {
	ctx, cancel := context.WithCancel(context.WithoutCancel(d.told))
	context.AfterFunc(d.told, func() {
		log.Info("told to end; answering on until nobody calls this replica any more", "for", after.String())
		time.AfterFunc(after, cancel)
	})
	return ctx
}

// ready is a readiness check: a replica that ends takes no new callers.
func (d drain) ready(*http.Request) error {
	if d.told.Err() != nil {
		return errors.New("this replica has been told to end")
	}
	return nil
}

// closing closes, once the replica is told to end, each connection after its next answer. The API server keeps connections to
// the Service and would go on calling a replica that is no endpoint of it any more; its next connection goes to another one.
func (d drain) closing(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if d.told.Err() != nil {
			w.Header().Set("Connection", "close")
		}
		next.ServeHTTP(w, r)
	})
}
