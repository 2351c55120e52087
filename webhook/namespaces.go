package webhook

import (
	"context"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/builder"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/predicate"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

// namespaceController says on a namespace that the value of its ModeLabel is none. It runs in one replica, the leader.
type namespaceController struct {
	namespaces  client.Reader
	events      events.EventRecorder
	log         logr.Logger
	defaultMode Mode
}

func (c *namespaceController) setUp(manager ctrl.Manager) error {
	return ctrl.NewControllerManagedBy(manager).Named("namespace-modes").
		For(&corev1.Namespace{}, builder.OnlyMetadata, builder.WithPredicates(predicate.LabelChangedPredicate{})).
		Complete(c)
}

// Reconcile looks at one namespace.
func (c *namespaceController) Reconcile(ctx context.Context, request reconcile.Request) (reconcile.Result, error) {
	namespace := &metav1.PartialObjectMetadata{}
	namespace.SetGroupVersionKind(corev1.SchemeGroupVersion.WithKind("Namespace"))
	if err := c.namespaces.Get(ctx, request.NamespacedName, namespace); err != nil {
		return reconcile.Result{}, client.IgnoreNotFound(err)
	}
	text, labelled := namespace.Labels[ModeLabel]
	if !labelled {
		return reconcile.Result{}, nil
	}
	if _, err := parseMode(text); err != nil {
		c.log.Info("a namespace has a label that is no mode", "namespace", namespace.Name, "label", ModeLabel, "value", text, "modeInForce", c.defaultMode)
		c.events.Eventf(namespace, nil, corev1.EventTypeWarning, "InvalidMode", "ReadMode",
			"label %s: %v; until then the default is in force here: %s", ModeLabel, err, c.defaultMode)
	}
	return reconcile.Result{}, nil
}
