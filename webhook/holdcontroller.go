package webhook

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller"
	"sigs.k8s.io/controller-runtime/pkg/event"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/eni-guard/eni-guard/internal/sandbox"
)

const (
	// holdWait is how long an agent may take to say that a held pod is released.
	holdWait = 20 * time.Second
	// holdRetry is the least time between two questions about one held pod.
	holdRetry = 5 * time.Second
	// conflictRetry is the pause before a pod is looked at again that has changed since it was read.
	conflictRetry = time.Second
	// unmarkedFor is for how long the controller must have seen a pod carry Finalizer without being deleted. The request that it was
	// held for has failed by then: the API server ends a request after a minute.
	unmarkedFor = 2 * time.Minute
	// concurrentHolds bounds how many held pods are waited for at once. Waiting costs the webhook a connection, and the agent a
	// look every other second; nodes that do not answer keep maxWaits of them each.
	concurrentHolds = 256
	// listPage is how many pods are read at once where all have to be looked through.
	listPage = 500
)

// holdController frees held pods as soon as their nodes have let go of them. It runs in one replica, the leader.
type holdController struct {
	*Guard
	pods client.Reader // cached, of pods with HeldLabel
	log  logr.Logger
	// unmarked has a firstSight of each held pod that is not being deleted, by its types.NamespacedName.
	unmarked sync.Map
}

// firstSight is when the controller has first seen, by its own clock, that a pod is held since a time. What the annotation says is the
// clock of another replica, or of whoever may annotate pods; and while an eviction is under way, nothing but the finalizer keeps
// the pod, because the API server does not ask again.
type firstSight struct {
	uid   types.UID
	since string
	at    time.Time
}

func (c *holdController) setUp(manager ctrl.Manager) error {
	if err := manager.Add(leaderTask(c.findUnlabelled)); err != nil {
		return err
	}
	return ctrl.NewControllerManagedBy(manager).Named("held-pods").For(&corev1.Pod{}, builder.WithPredicates(changesTheHold)).
		WithOptions(controller.Options{MaxConcurrentReconciles: concurrentHolds}).
		Complete(c)
}

// changesTheHold leaves out updates that say nothing new, above all the controller's own explanations: an answer to each
// would be a question without a pause.
var changesTheHold = predicate.Funcs{UpdateFunc: func(e event.UpdateEvent) bool {
	before, after := e.ObjectOld, e.ObjectNew
	return !slices.Equal(before.GetFinalizers(), after.GetFinalizers()) || !before.GetDeletionTimestamp().Equal(after.GetDeletionTimestamp()) ||
		before.GetAnnotations()[HeldSinceAnnotation] != after.GetAnnotations()[HeldSinceAnnotation]
}}

// Reconcile waits for one held pod.
func (c *holdController) Reconcile(ctx context.Context, request reconcile.Request) (reconcile.Result, error) {
	pod := &corev1.Pod{}
	err := c.pods.Get(ctx, request.NamespacedName, pod)
	if err != nil || !held(pod) || pod.DeletionTimestamp != nil {
		c.unmarked.Delete(request.NamespacedName)
	}
	if apierrors.IsNotFound(err) {
		return reconcile.Result{}, c.keepLabelled(ctx, request)
	}
	if err != nil {
		return reconcile.Result{}, err
	}
	if !held(pod) {
		return reconcile.Result{}, nil
	}
	if pod.DeletionTimestamp == nil {
		return c.reconcileUnmarked(ctx, pod)
	}
	asked := c.now()
	d := c.judgeHeld(ctx, pod)
	if d.outcome == Allowed {
		return reconcile.Result{}, c.release(ctx, pod, d)
	}
	if because := finding(pod, d); because != pod.Annotations[HeldBecauseAnnotation] && !knewMore(pod, d) {
		if err := c.holds.explain(ctx, pod, because); client.IgnoreNotFound(err) != nil {
			return reconcile.Result{}, err
		}
	}
	// An agent makes its caller wait; where it did not, because there is none, or an old one, the wait is here.
	return reconcile.Result{RequeueAfter: max(time.Millisecond, holdRetry-c.now().Sub(asked))}, nil
}

// knewMore says whether something was found of the pod before, while now its node cannot be asked: an agent that is restarted must not
// take away what people look for. One that answers, but cannot look everywhere, has not found it again.
func knewMore(pod *corev1.Pod, d decision) bool {
	before := pod.Annotations[HeldBecauseAnnotation]
	return d.reason == ReasonNoAnswer && before != "" && !strings.HasPrefix(before, cannotTell)
}

// judgeHeld decides about a held pod as about its removal, but waits for the release.
func (c *holdController) judgeHeld(ctx context.Context, pod *corev1.Pod) decision {
	e := c.evidence(ctx, pod, func(ctx context.Context, address string, q sandbox.Query) (sandbox.Report, error) {
		return c.agents.await(ctx, address, q, holdWait)
	})
	return decide(situation{mode: ModeHold, holdable: true, evidence: e})
}

// reconcileUnmarked takes the finalizer back from a pod that nobody deletes after all, because something else has refused
// the request that it was held for.
func (c *holdController) reconcileUnmarked(ctx context.Context, pod *corev1.Pod) (reconcile.Result, error) {
	key, seen := client.ObjectKeyFromObject(pod), firstSight{pod.UID, pod.Annotations[HeldSinceAnnotation], c.now()}
	before, _ := c.unmarked.Load(key)
	if first, found := before.(firstSight); found && first.uid == seen.uid && first.since == seen.since {
		seen = first
	}
	c.unmarked.Store(key, seen)
	if left := seen.at.Add(unmarkedFor).Sub(c.now()); left > 0 {
		return reconcile.Result{RequeueAfter: left}, nil
	}
	// Only as it was read: a removal that has begun since relies on the finalizer.
	if err := c.holds.free(ctx, pod); apierrors.IsConflict(err) {
		return reconcile.Result{RequeueAfter: conflictRetry}, nil
	} else if client.IgnoreNotFound(err) != nil {
		return reconcile.Result{}, err
	}
	c.unmarked.Delete(key)
	c.log.Info("no longer holds a pod that is not being deleted", "namespace", pod.Namespace, "pod", pod.Name, "podUID", pod.UID)
	return reconcile.Result{}, nil
}

// release frees a pod whose node has let go of it, whatever has changed since it was read: nothing brings that pod back.
func (c *holdController) release(ctx context.Context, pod *corev1.Pod, d decision) error {
	anyVersion := pod.DeepCopy()
	anyVersion.ResourceVersion = ""
	if err := c.holds.free(ctx, anyVersion); apierrors.IsNotFound(err) {
		return nil // it was freed before, and the cache lags behind
	} else if err != nil {
		return err
	}
	c.log.Info("freed a held pod", "reason", d.reason, "verdict", d.verdict, "namespace", pod.Namespace, "pod", pod.Name, "podUID", pod.UID,
		"node", pod.Spec.NodeName, "podIPs", podIPs(pod), "heldSince", pod.Annotations[HeldSinceAnnotation], "evidence", evidenceWords(d))
	c.events.Eventf(reference(pod), nil, corev1.EventTypeNormal, "HoldReleased", "release", "%s",
		fmt.Sprintf("pod %s/%s is no longer held: %s", pod.Namespace, pod.Name, goneWords(d, pod.Spec.NodeName)))
	return nil
}

// keepLabelled looks after a pod that has left the cache: it is gone, or free, or has lost HeldLabel, without which
// nothing would ever free it.
func (c *holdController) keepLabelled(ctx context.Context, request reconcile.Request) error {
	pod := &metav1.PartialObjectMetadata{}
	pod.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Pod"))
	if err := c.live.Get(ctx, request.NamespacedName, pod); err != nil {
		return client.IgnoreNotFound(err)
	}
	if !slices.Contains(pod.Finalizers, Finalizer) || pod.Labels[HeldLabel] == "true" {
		return nil
	}
	c.log.Info("a held pod had lost its label", "namespace", pod.Namespace, "pod", pod.Name, "podUID", pod.UID)
	return client.IgnoreNotFound(c.holds.label(ctx, pod))
}

// findUnlabelled does the same for pods that lost the label while no replica was there to see it.
func (c *holdController) findUnlabelled(ctx context.Context) error {
	return wait.PollUntilContextCancel(ctx, holdRetry, true, func(ctx context.Context) (bool, error) {
		found, err := heldPods(ctx, c.live)
		for _, pod := range found {
			err = errors.Join(err, c.keepLabelled(ctx, reconcile.Request{NamespacedName: client.ObjectKeyFromObject(&pod)}))
		}
		if err != nil {
			c.log.Error(err, "could not look for held pods; trying again")
		}
		return err == nil, nil
	})
}

// heldPods looks through all pods of the cluster, page by page, for those with Finalizer.
func heldPods(ctx context.Context, live client.Reader) ([]metav1.PartialObjectMetadata, error) {
	var found []metav1.PartialObjectMetadata
	list := &metav1.PartialObjectMetadataList{}
	list.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("PodList"))
	for {
		if err := live.List(ctx, list, client.Limit(listPage), client.Continue(list.Continue)); err != nil {
			return nil, err
		}
		for _, pod := range list.Items {
			if slices.Contains(pod.Finalizers, Finalizer) {
				found = append(found, pod)
			}
		}
		if list.Continue == "" {
			return found, nil
		}
	}
}

// leaderTask runs once in the leader.
type leaderTask func(ctx context.Context) error

// Start implements manager.Runnable. That the process ends is no error.
func (t leaderTask) Start(ctx context.Context) error {
	if err := t(ctx); ctx.Err() == nil {
		return err
	}
	return nil
}

// NeedLeaderElection implements manager.LeaderElectionRunnable.
func (leaderTask) NeedLeaderElection() bool { return true }
