package pki

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/go-logr/logr"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/rand"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"
	applymetav1 "k8s.io/client-go/applyconfigurations/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	toolscache "k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/manager"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
	"sigs.k8s.io/controller-runtime/pkg/source"

	"github.com/eni-guard/eni-guard/internal/mtls"
)

const (
	// fieldManager is whose the fields are that the rotator has written.
	fieldManager = "eni-guard"
	// lookAgainAtLeast bounds how late a renewal can be where the clock of the machine has stood still with it.
	lookAgainAtLeast = time.Hour
	// retryAfter is how soon one tries again what has failed.
	retryAfter = 2 * time.Second
)

// The keys of the Secret of the authorities.
const (
	signingKey = "signing"
	nextKey    = "next"
	trustedKey = "trusted.crt"
	settledKey = "settled"
)

// Rotator makes and rotates the certificates of one release. It writes in one replica, the leader; all replicas read.
type Rotator struct {
	// Release and Namespace are those of the Helm release, whose names the chart derives all others from.
	Release, Namespace string
	Settings           Settings
	// Serving and Asking are given what the webhook serves the API server with, and what it asks agents with.
	Serving, Asking *mtls.Memory

	live   client.Reader // a cache may not have yet what this replica has just made
	client client.Client
	log    logr.Logger
	now    func() time.Time
	// replica tells this one from the others.
	replica string
}

func (r *Rotator) authoritySecret() string { return r.Release + "-ca" }
func (r *Rotator) servingSecret() string   { return r.Release + "-webhook-tls" }
func (r *Rotator) askingSecret() string    { return r.Release + "-client-tls" }

// leafSecrets returns the Secret of each name that there must be a certificate for.
func (r *Rotator) leafSecrets() map[string]string {
	return map[string]string{
		fmt.Sprintf("%s-webhook.%s.svc", r.Release, r.Namespace): r.servingSecret(),
		mtls.AgentName:   r.Release + "-agent-tls",
		mtls.WebhookName: r.askingSecret(),
	}
}

func (r *Rotator) configurations() []string { return []string{r.Release, r.Release + "-failing-open"} }

// SetUp adds the rotator to a manager that elects a leader.
func (r *Rotator) SetUp(m ctrl.Manager, log logr.Logger) error {
	r.live, r.client, r.log, r.now = m.GetAPIReader(), m.GetClient(), log, time.Now
	r.replica = rand.String(8)
	api, err := kubernetes.NewForConfig(m.GetConfig())
	if err != nil {
		return err
	}
	// One watch for each object: the right to see them is given by their names.
	watch := func(api rest.Interface, resource, namespace, name string, object client.Object) toolscache.SharedInformer {
		return toolscache.NewSharedInformer(toolscache.NewListWatchFromClient(api, resource, namespace, fields.OneTermEqualSelector("metadata.name", name)), object, 0)
	}
	var watches []toolscache.SharedInformer
	for _, name := range append(slices.Collect(maps.Values(r.leafSecrets())), r.authoritySecret()) {
		secret := watch(api.CoreV1().RESTClient(), "secrets", r.Namespace, name, &corev1.Secret{})
		watches = append(watches, secret)
		if memory := map[string]*mtls.Memory{r.servingSecret(): r.Serving, r.askingSecret(): r.Asking}[name]; memory != nil {
			if _, err := secret.AddEventHandler(onChange(func(object any) { r.remember(memory, object) })); err != nil {
				return err
			}
		}
	}
	for _, name := range r.configurations() {
		watches = append(watches, watch(api.AdmissionregistrationV1().RESTClient(), "validatingwebhookconfigurations", "", name, &admissionregistrationv1.ValidatingWebhookConfiguration{}))
	}
	for _, w := range watches {
		if err := m.Add(everywhere(func(ctx context.Context) error { w.RunWithContext(ctx); return nil })); err != nil {
			return err
		}
	}
	return ctrl.NewControllerManagedBy(m).Named("certificates").
		WatchesRawSource(source.Func(func(_ context.Context, queue workqueue.TypedRateLimitingInterface[reconcile.Request]) error {
			// What is not there yet makes no event.
			queue.Add(reconcile.Request{})
			var errs []error
			for _, w := range watches {
				_, err := w.AddEventHandler(onChange(func(any) { queue.Add(reconcile.Request{}) }))
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		})).
		Complete(r)
}

// everywhere is a manager's part that runs in every replica.
type everywhere func(context.Context) error

var _ manager.LeaderElectionRunnable = everywhere(nil)

func (f everywhere) Start(ctx context.Context) error { return f(ctx) }
func (everywhere) NeedLeaderElection() bool          { return false }

func onChange(do func(object any)) toolscache.ResourceEventHandlerFuncs {
	return toolscache.ResourceEventHandlerFuncs{
		AddFunc:    do,
		UpdateFunc: func(_, object any) { do(object) },
		DeleteFunc: do,
	}
}

// remember takes over what a Secret holds. What was deleted or cannot be read changes nothing: what was read before is in
// force until the leader has made the Secret anew.
func (r *Rotator) remember(memory *mtls.Memory, object any) {
	secret, isSecret := object.(*corev1.Secret)
	if !isSecret {
		return
	}
	if err := memory.Set(secret.Data); err != nil {
		r.log.Error(err, "cannot read the certificate of a Secret; the one read before stays in force", "secret", secret.Name)
	}
}

// Reconcile does the next step.
func (r *Rotator) Reconcile(ctx context.Context, _ reconcile.Request) (reconcile.Result, error) {
	again, err := r.next(ctx)
	switch {
	case apierrors.IsConflict(err):
		r.log.Info("somebody else has just written; looking again", "conflict", err.Error())
		return reconcile.Result{RequeueAfter: retryAfter}, nil
	case err != nil:
		r.log.Error(err, "could not rotate the certificates; trying again", "after", retryAfter.String())
		return reconcile.Result{RequeueAfter: retryAfter}, nil
	default:
		return reconcile.Result{RequeueAfter: min(max(again.Sub(r.now()), time.Millisecond), lookAgainAtLeast)}, nil
	}
}

// next does one step, and says when to look again.
func (r *Rotator) next(ctx context.Context) (time.Time, error) {
	objects, err := r.read(ctx)
	if err != nil {
		return time.Time{}, err
	}
	now, there := r.now(), objects.state(r)
	step, err := plan(r.Settings, there, now)
	if err != nil {
		return time.Time{}, err
	}
	if step.change != keep {
		r.log.Info("changing the authorities", "change", string(step.change), "because", step.because)
		changed, err := after(r.Settings, there, step.change, now)
		if err != nil {
			return time.Time{}, err
		}
		data, err := changed.encode()
		if err != nil {
			return time.Time{}, err
		}
		return now, r.write(ctx, objects.secrets[r.authoritySecret()], r.authoritySecret(), corev1.SecretTypeOpaque, data)
	}
	a := there.authorities
	trusted, err := encodeAll(a.trusted)
	if err != nil {
		return time.Time{}, err
	}
	for _, name := range step.bundles {
		r.log.Info("writing the trusted authorities", "configuration", name, "authorities", len(a.trusted))
		if err := r.writeBundle(ctx, objects.configurations[name], trusted); err != nil {
			return time.Time{}, err
		}
	}
	signer := a.signing
	if !signer.canSign(now) {
		signer = a.next
	}
	for _, name := range slices.Concat(step.leaves, step.spread) {
		secret := r.leafSecrets()[name]
		l := there.leaves[name]
		if slices.Contains(step.leaves, name) {
			fresh, err := newLeaf(signer, name, now, r.Settings.Leaf)
			if err != nil {
				return time.Time{}, err
			}
			l = &leaf{pair: fresh}
		}
		r.log.Info("writing a certificate", "secret", secret, "name", name, "until", l.certificate.NotAfter.Format(time.RFC3339), "by", l.certificate.Issuer.CommonName,
			"authorities", len(a.trusted))
		data := map[string][]byte{corev1.ServiceAccountRootCAKey: trusted}
		if data[corev1.TLSCertKey], data[corev1.TLSPrivateKeyKey], err = l.encode(); err != nil {
			return time.Time{}, err
		}
		if err := r.write(ctx, objects.secrets[secret], secret, corev1.SecretTypeTLS, data); err != nil {
			return time.Time{}, err
		}
	}
	return step.again, nil
}

// stored are the objects that the rotator writes; those that are missing are not in the maps.
type stored struct {
	secrets        map[string]*corev1.Secret
	configurations map[string]*admissionregistrationv1.ValidatingWebhookConfiguration
}

func (r *Rotator) read(ctx context.Context) (stored, error) {
	objects := stored{map[string]*corev1.Secret{}, map[string]*admissionregistrationv1.ValidatingWebhookConfiguration{}}
	for _, name := range append(slices.Collect(maps.Values(r.leafSecrets())), r.authoritySecret()) {
		secret := &corev1.Secret{}
		if err := r.live.Get(ctx, types.NamespacedName{Namespace: r.Namespace, Name: name}, secret); err == nil {
			objects.secrets[name] = secret
		} else if !apierrors.IsNotFound(err) {
			return stored{}, err
		}
	}
	for _, name := range r.configurations() {
		configuration := &admissionregistrationv1.ValidatingWebhookConfiguration{}
		if err := r.live.Get(ctx, types.NamespacedName{Name: name}, configuration); err == nil {
			objects.configurations[name] = configuration
		} else if !apierrors.IsNotFound(err) {
			return stored{}, err
		}
	}
	return objects, nil
}

// state reads what the objects hold.
func (s stored) state(r *Rotator) state {
	there := state{leaves: map[string]*leaf{}, bundles: map[string][]byte{}}
	if secret := s.secrets[r.authoritySecret()]; secret != nil {
		there.authorities = decodeAuthorities(secret.Data)
	}
	for name, secret := range r.leafSecrets() {
		there.leaves[name] = nil
		if stored := s.secrets[secret]; stored != nil {
			if read, err := decode(stored.Data[corev1.TLSCertKey], stored.Data[corev1.TLSPrivateKeyKey]); err == nil {
				there.leaves[name] = &leaf{read, stored.Data[corev1.ServiceAccountRootCAKey]}
			}
		}
	}
	// Without the list of those that are trusted, the ones beside the leaves tell it.
	if a := there.authorities; a != nil && len(decodeAll(s.secrets[r.authoritySecret()].Data[trustedKey])) == 0 {
		a.trusted = trustedAnywhere(there)
	}
	for name, configuration := range s.configurations {
		bundles := map[string]bool{}
		for _, webhook := range configuration.Webhooks {
			there.bundles[name] = webhook.ClientConfig.CABundle
			bundles[string(webhook.ClientConfig.CABundle)] = true
		}
		if len(bundles) > 1 { // so one of them is wrong
			there.bundles[name] = nil
		}
	}
	return there
}

// encode writes the authorities as the data of their Secret.
func (a *authorities) encode() (map[string][]byte, error) {
	data := map[string][]byte{}
	for key, p := range map[string]*pair{signingKey: a.signing, nextKey: a.next} {
		if p == nil {
			continue
		}
		var err error
		if data[key+".crt"], data[key+".key"], err = p.encode(); err != nil {
			return nil, err
		}
	}
	if !a.settled.IsZero() {
		data[settledKey] = []byte(a.settled.UTC().Format(time.RFC3339))
	}
	var err error
	data[trustedKey], err = encodeAll(a.trusted)
	return data, err
}

// decodeAuthorities reads the data of their Secret. What cannot be read counts as lost.
func decodeAuthorities(data map[string][]byte) *authorities {
	a := &authorities{trusted: decodeAll(data[trustedKey])}
	for key, target := range map[string]**pair{signingKey: &a.signing, nextKey: &a.next} {
		if read, err := decode(data[key+".crt"], data[key+".key"]); err == nil {
			*target = read
			a.trusted = union(a.trusted, read.certificate)
		}
	}
	if at, err := time.Parse(time.RFC3339, string(data[settledKey])); err == nil {
		a.settled = at
	}
	return a
}

// write makes a Secret, or changes the one that was read, unless somebody else has done so since.
func (r *Rotator) write(ctx context.Context, was *corev1.Secret, name string, kind corev1.SecretType, data map[string][]byte) error {
	account := &corev1.ServiceAccount{}
	if err := r.live.Get(ctx, types.NamespacedName{Namespace: r.Namespace, Name: r.Release + "-webhook"}, account); err != nil {
		return err
	}
	if was == nil {
		return r.create(ctx, account, name, kind, data)
	}
	now := was.DeepCopy()
	now.Data = data
	// Of today's account only: Kubernetes would delete a Secret whose owners are gone.
	now.OwnerReferences = slices.DeleteFunc(now.OwnerReferences, func(o metav1.OwnerReference) bool { return o.Kind == "ServiceAccount" && o.UID != account.UID })
	if !slices.ContainsFunc(now.OwnerReferences, func(o metav1.OwnerReference) bool { return o.UID == account.UID }) {
		now.OwnerReferences = append(now.OwnerReferences, metav1.OwnerReference{APIVersion: "v1", Kind: "ServiceAccount", Name: account.Name, UID: account.UID})
	}
	if err := r.client.Patch(ctx, now, client.MergeFromWithOptions(was, client.MergeFromWithOptimisticLock{}), client.FieldOwner(fieldManager)); err != nil {
		return fmt.Errorf("changing Secret %s: %w", name, err)
	}
	return nil
}

// create makes a Secret that is deleted with the webhook's account. It does so by an apply, because the right to that can
// be given for a name, other than to a create; and under a name of this replica's own, without force, because of two
// replicas that take themselves for the leader the second then gets a conflict.
func (r *Rotator) create(ctx context.Context, account *corev1.ServiceAccount, name string, kind corev1.SecretType, data map[string][]byte) error {
	secret := applycorev1.Secret(name, r.Namespace).WithType(kind).WithData(data).
		WithLabels(map[string]string{
			"app.kubernetes.io/name": "eni-guard", "app.kubernetes.io/instance": r.Release, "app.kubernetes.io/part-of": "eni-guard",
			"app.kubernetes.io/managed-by": "eni-guard",
		}).
		WithOwnerReferences(applymetav1.OwnerReference().WithAPIVersion("v1").WithKind("ServiceAccount").WithName(account.Name).WithUID(account.UID))
	if err := r.client.Apply(ctx, secret, client.FieldOwner(fieldManager+"-"+r.replica)); err != nil {
		return fmt.Errorf("making Secret %s: %w", name, err)
	}
	return nil
}

// writeBundle changes the caBundle of a configuration and nothing else, unless somebody else has changed anything since.
func (r *Rotator) writeBundle(ctx context.Context, was *admissionregistrationv1.ValidatingWebhookConfiguration, bundle []byte) error {
	type operation struct {
		Op    string `json:"op"`
		Path  string `json:"path"`
		Value any    `json:"value"`
	}
	patch := []operation{{"replace", "/metadata/resourceVersion", was.ResourceVersion}}
	for i := range was.Webhooks {
		patch = append(patch, operation{"add", fmt.Sprintf("/webhooks/%d/clientConfig/caBundle", i), bundle})
	}
	body, err := json.Marshal(patch)
	if err != nil {
		return err
	}
	if err := r.client.Patch(ctx, was.DeepCopy(), client.RawPatch(types.JSONPatchType, body), client.FieldOwner(fieldManager)); err != nil {
		return fmt.Errorf("changing ValidatingWebhookConfiguration %s: %w", was.Name, err)
	}
	return nil
}
