package pki

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"maps"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/go-logr/logr/testr"
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"

	"github.com/eni-guard/eni-guard/internal/mtls"
)

// world is an API server with a release, a clock, and what could be read at which time.
type world struct {
	*Rotator
	t       *testing.T
	api     client.Client
	clock   time.Time
	history []view
	// was is the last leaf and list that was there, by name of the certificate: a running part keeps what it has.
	was map[string]leaf
	// blind worlds do not look whether everybody trusts everybody.
	blind bool
}

// view is what can be read from a time on.
type view struct {
	from   time.Time
	leaves map[string]leaf
	bundle []byte
}

func newWorld(t *testing.T) *world {
	configuration := func(name string) client.Object {
		return &admissionregistrationv1.ValidatingWebhookConfiguration{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Webhooks: []admissionregistrationv1.ValidatingWebhook{{Name: "force-delete.eni-guard.io"}},
		}
	}
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "r-webhook", Namespace: "ns", UID: "account"}}
	// The fake goes through all that a scheme knows, at each patch.
	scheme := runtime.NewScheme()
	if err := errors.Join(corev1.AddToScheme(scheme), admissionregistrationv1.AddToScheme(scheme)); err != nil {
		t.Fatal(err)
	}
	api := fake.NewClientBuilder().WithScheme(scheme).WithObjects(account, configuration("r"), configuration("r-failing-open")).Build()
	w := &world{t: t, api: api, clock: start, was: map[string]leaf{}}
	w.Rotator = &Rotator{
		Release: "r", Namespace: "ns", Settings: settings,
		live: api, client: api, log: testr.NewWithOptions(t, testr.Options{Verbosity: -1}), now: func() time.Time { return w.clock }, replica: "one",
	}
	return w
}

func (w *world) objects() stored {
	w.t.Helper()
	objects, err := w.read(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return objects
}

// settle does what there is to do now, and returns when there is more.
func (w *world) settle() time.Time {
	w.t.Helper()
	for range 20 {
		again, err := w.next(context.Background())
		if err != nil {
			w.t.Fatal(err)
		}
		w.look()
		if again.After(w.clock) {
			return again
		}
	}
	w.t.Fatal("it never has enough")
	return time.Time{}
}

// until lets time pass.
func (w *world) until(end time.Time) {
	w.t.Helper()
	for again := w.settle(); again.Before(end); again = w.settle() {
		w.clock = again
	}
	w.clock = end
}

// look remembers what can be read now, and fails the test unless everybody trusts everybody, even those who have not read
// anything for almost an overlap.
func (w *world) look() {
	w.t.Helper()
	there := w.objects().state(w.Rotator)
	for name, l := range there.leaves {
		if l != nil {
			w.was[name] = *l
		}
	}
	now := view{w.clock, maps.Clone(w.was), there.bundles["r"]}
	if last := len(w.history) - 1; len(w.was) == 0 || w.blind || last >= 0 && reflect.DeepEqual(now.leaves, w.history[last].leaves) && bytes.Equal(now.bundle, w.history[last].bundle) {
		return
	}
	w.history = append(w.history, now)
	lag := w.clock.Add(-w.Settings.Overlap + time.Second)
	var inForce []view
	for i, v := range w.history {
		if i == len(w.history)-1 || w.history[i+1].from.After(lag) {
			inForce = append(inForce, v)
		}
	}
	for _, shown := range inForce {
		for _, trusting := range inForce {
			for _, c := range []struct {
				who, name string
				trusted   []byte
			}{
				{"the webhook an agent", mtls.AgentName, trusting.leaves[mtls.WebhookName].trusted},
				{"an agent the webhook", mtls.WebhookName, trusting.leaves[mtls.AgentName].trusted},
				{"the API server the webhook", "r-webhook.ns.svc", trusting.bundle},
			} {
				if l := shown.leaves[c.name]; l.pair != nil && c.trusted != nil && !vouches(decodeAll(c.trusted), l.certificate, c.name, w.clock) {
					w.t.Errorf("at %s does not trust: %s (shown since %s, trusting since %s)", w.clock, c.who, shown.from, trusting.from)
				}
			}
		}
	}
}

// signers are the authorities that the leaves are of, and how many are trusted.
func (w *world) signers() (signers []string, trusted int) {
	for _, l := range w.objects().state(w.Rotator).leaves {
		if l != nil {
			signers = append(signers, string(l.certificate.AuthorityKeyId))
		}
	}
	slices.Sort(signers)
	return slices.Compact(signers), len(decodeAll(w.objects().configurations["r"].Webhooks[0].ClientConfig.CABundle))
}

func (w *world) deleteSecrets(names ...string) {
	for _, name := range names {
		if err := w.api.Delete(w.t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "ns"}}); err != nil {
			w.t.Fatal(err)
		}
	}
}

// Nobody is ever shown a certificate that it does not trust, in years and whatever is lost, as long as it reads what has
// changed before the overlap ends.
func TestRotationNeverBreaksATrust(t *testing.T) {
	for name, c := range map[string]struct {
		before, during func(w *world)
	}{
		"from nothing": {},
		"from the certificates of a chart that made them for ten years": {before: func(w *world) {
			old, err := newAuthority(w.clock, 3650*day)
			if err != nil {
				t.Fatal(err)
			}
			list, err := encodeAll([]*x509.Certificate{old.certificate})
			if err != nil {
				t.Fatal(err)
			}
			for name, secret := range w.leafSecrets() {
				l, err := newLeaf(old, name, w.clock, 3650*day)
				if err != nil {
					t.Fatal(err)
				}
				data := map[string][]byte{"ca.crt": list}
				if data["tls.crt"], data["tls.key"], err = l.encode(); err != nil {
					t.Fatal(err)
				}
				stored := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: secret, Namespace: "ns"}, Type: corev1.SecretTypeTLS, Data: data}
				if err := w.api.Create(t.Context(), stored); err != nil {
					t.Fatal(err)
				}
			}
			for _, configuration := range w.objects().configurations {
				configuration.Webhooks[0].ClientConfig.CABundle = list
				if err := w.api.Update(t.Context(), configuration); err != nil {
					t.Fatal(err)
				}
			}
		}},
		"the authority is deleted":   {during: func(w *world) { w.deleteSecrets("r-ca") }},
		"a certificate is deleted":   {during: func(w *world) { w.deleteSecrets("r-agent-tls") }},
		"certificates are deleted":   {during: func(w *world) { w.deleteSecrets("r-agent-tls", "r-client-tls", "r-webhook-tls") }},
		"the authority is corrupted": {during: func(w *world) { w.corrupt("r-ca", "signing.key", "trusted.crt") }},
		"a certificate is corrupted": {during: func(w *world) { w.corrupt("r-webhook-tls", "tls.key") }},
		"the settings get shorter": {during: func(w *world) {
			w.Settings = Settings{Authority: 300 * day, Leaf: 100 * day, Overlap: time.Hour}
		}},
		"the settings get longer": {during: func(w *world) {
			w.Settings = Settings{Authority: 3650 * day, Leaf: 365 * day, Overlap: 24 * time.Hour}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.Settings.Leaf = 300 * day
			if c.before != nil {
				c.before(w)
				w.look()
			}
			authorities := map[string]bool{}
			for _, until := range []time.Duration{400 * day, 400*day + 10*time.Minute, 666*day + 16*time.Hour + time.Minute, 1500 * day} {
				if w.until(start.Add(until)); c.during != nil {
					c.during(w)
					w.look()
				}
				w.settle()
				signers, _ := w.signers()
				for _, signer := range signers {
					authorities[signer] = true
				}
			}
			w.clock = w.clock.Add(2 * w.Settings.Overlap)
			w.until(w.clock.Add(2 * w.Settings.Overlap))
			if signers, trusted := w.signers(); len(signers) != 1 || trusted != 1 {
				t.Errorf("in the end, %d authorities have signed, and %d are trusted", len(signers), trusted)
			}
			if len(authorities) < 2 {
				t.Errorf("only %d authorities in four years", len(authorities))
			}
		})
	}
}

// corrupt overwrites keys of a Secret.
func (w *world) corrupt(name string, keys ...string) {
	secret := w.objects().secrets[name]
	for _, key := range keys {
		secret.Data[key] = []byte("-----BEGIN CERTIFICATE-----\nrubbish")
	}
	if err := w.api.Update(w.t.Context(), secret); err != nil {
		w.t.Fatal(err)
	}
}

// A replica that was stopped for longer than anything is valid makes everything anew at once.
func TestAPausedReplicaRenewsAtOnce(t *testing.T) {
	w := newWorld(t)
	w.settle()
	w.clock = start.Add(70 * day)
	w.settle()
	if l := w.objects().state(w.Rotator).leaves[mtls.AgentName]; !l.certificate.NotAfter.Equal(w.clock.Add(settings.Leaf)) {
		t.Errorf("a certificate that was due ten days ago is good until %s", l.certificate.NotAfter)
	}
	w.clock = start.Add(2000 * day)
	w.blind = true
	if again := w.settle(); !again.Equal(w.clock.Add(60 * day)) {
		t.Errorf("there is more to do, at %s", again)
	}
	for name, l := range w.objects().state(w.Rotator).leaves {
		if !vouches(decodeAll(l.trusted), l.certificate, name, w.clock) {
			t.Errorf("the certificate of %s is not valid", name)
		}
	}
}

// A webhook that somebody has added to a configuration is given the authorities too.
func TestEachWebhookOfAConfigurationIsGivenTheAuthorities(t *testing.T) {
	w := newWorld(t)
	w.settle()
	configuration := w.objects().configurations["r"]
	bundle := configuration.Webhooks[0].ClientConfig.CABundle
	configuration.Webhooks = append([]admissionregistrationv1.ValidatingWebhook{{Name: "added.example.com"}}, configuration.Webhooks...)
	if err := w.api.Update(t.Context(), configuration); err != nil {
		t.Fatal(err)
	}
	w.settle()
	for _, webhook := range w.objects().configurations["r"].Webhooks {
		if !bytes.Equal(webhook.ClientConfig.CABundle, bundle) {
			t.Errorf("%s has another caBundle", webhook.Name)
		}
	}
}

// unreadable is an API server that is away.
type unreadable struct{ client.Reader }

func (unreadable) Get(context.Context, client.ObjectKey, client.Object, ...client.GetOption) error {
	return errors.New("connection refused")
}

// Where nothing is to be done for weeks, one looks again all the same: the clock of a machine may stand still with it. What fails is tried
// again soon.
func TestOneLooksAgainInTime(t *testing.T) {
	w := newWorld(t)
	w.settle()
	if result, err := w.Reconcile(t.Context(), reconcile.Request{}); err != nil || result.RequeueAfter != lookAgainAtLeast {
		t.Errorf("again after %s (%v)", result.RequeueAfter, err)
	}
	w.live = unreadable{}
	if result, err := w.Reconcile(t.Context(), reconcile.Request{}); err != nil || result.RequeueAfter != retryAfter {
		t.Errorf("after a failure again after %s (%v)", result.RequeueAfter, err)
	}
}

// Of two replicas that take themselves for the leader, one makes the authority, and the other one takes that.
func TestTwoReplicasMakeOneAuthority(t *testing.T) {
	w := newWorld(t)
	w.settle()
	w.replica = "other"
	late := &authorities{signing: authority(t, start)}
	data, err := late.encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := w.write(t.Context(), nil, "r-ca", corev1.SecretTypeOpaque, data); !apierrors.IsConflict(err) {
		t.Errorf("the late replica did not get a conflict: %v", err)
	}
	bundle := w.objects().configurations["r"]
	if err := w.writeBundle(t.Context(), bundle, []byte("first")); err != nil {
		t.Fatal(err)
	}
	if err := w.writeBundle(t.Context(), bundle, []byte("second")); !apierrors.IsConflict(err) {
		t.Errorf("a replica that has slept did not get a conflict about the configuration: %v", err)
	}
	stale := w.objects().secrets["r-ca"]
	if err := w.write(t.Context(), stale, "r-ca", corev1.SecretTypeOpaque, data); err != nil {
		t.Fatal(err)
	}
	if err := w.write(t.Context(), stale, "r-ca", corev1.SecretTypeOpaque, data); !apierrors.IsConflict(err) {
		t.Errorf("a replica that has slept did not get a conflict: %v", err)
	}
}
