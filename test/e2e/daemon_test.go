package e2e

import (
	"context"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// killDaemon crashes a daemon of the cluster by its name, and returns how to start it as it was started before. At the
// end of the test it runs again in any case.
func killDaemon(t *testing.T, name string) (start func()) {
	t.Helper()
	again, err := cluster.KillDaemon(t.Context(), name)
	start = func() {
		if again == nil {
			return
		}
		if err := again(context.Background()); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(start)
	wentThrough(t, err)
	return start
}

// restart crashes a daemon of the cluster, starts it again, and waits until the cluster works: until it runs a new pod.
func restart(t *testing.T, name, namespace string) {
	t.Helper()
	killDaemon(t, name)()
	clusterWorks(t, namespace, "after-"+name)
}

// clusterWorks waits until the API server is ready, with etcd behind it, and a new pod runs, which needs every other part.
func clusterWorks(t *testing.T, namespace, name string) {
	t.Helper()
	err := incident.Wait(t.Context(), 2*time.Minute, "the API server to be ready", func(ctx context.Context) error {
		return cluster.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
	})
	if err == nil {
		err = incident.Wait(t.Context(), 2*time.Minute, "a pod to be created", func(ctx context.Context) error {
			_, err := cluster.CoreV1().Pods(namespace).Create(ctx, incident.Pod(namespace, name, []string{"sleep", "86400"}, nil), metav1.CreateOptions{})
			if apierrors.IsAlreadyExists(err) { // by a try whose answer was lost
				err = nil
			}
			return err
		})
	}
	if err == nil {
		_, err = cluster.AwaitStarted(t.Context(), namespace, name)
	}
	if err == nil {
		err = cluster.CoreV1().Pods(namespace).Delete(t.Context(), name, metav1.DeleteOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	restored(t)
}
