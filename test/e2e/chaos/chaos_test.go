// Package chaos breaks the parts of the cluster and of the guard, one after the other and in pairs, while pods of all kinds are
// removed in all the ways there are, and has an observer look whether an object goes before its sandbox does.
package chaos

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
	"github.com/eni-guard/eni-guard/test/e2e/observer"
)

const (
	repo = "../../.."
	// family starts the names of the namespaces of every run.
	family = "chaos-"
	// internName may do anything to pods; operatorName may override the guard as well. The administrator of the cluster may both,
	// and would make of every annotated pod's removal an override.
	internName   = "intern@example.com"
	operatorName = "operator@example.com"
	finalizer    = "eni-guard.io/sandbox-in-use"
)

// prefix starts the names of the namespaces of this run, which the audit log has not seen before.
var prefix = family + strconv.FormatInt(time.Now().Unix(), 36) + "-"

var (
	length = flag.Duration("length", 90*time.Second, "how long faults are injected and pods are made")
	seed   = flag.Uint64("seed", 0, "what the random choices begin with, as an earlier run has printed it; 0 takes the time")
)

// modes are the modes of the namespaces, and how many pods at a time each has. Those of audit and off are the controls: what
// the observer finds there proves that it can see.
var modes = []struct {
	name   string
	actors int
}{{"deny", 10}, {"hold", 8}, {"audit", 3}, {"off", 3}}

// run is one run of the test.
type run struct {
	t                *testing.T
	cluster          *incident.Cluster
	intern, operator kubernetes.Interface
	observer         *observer.Observer
	canary           *corev1.Pod

	mu      sync.Mutex
	counts  map[string]map[string]int
	outages []outage
}

func (r *run) count(what, how string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.counts[what] == nil {
		r.counts[what] = map[string]int{}
	}
	r.counts[what][how]++
}

// fail reports something wrong, and goes on: the counts tell more.
func (r *run) fail(format string, args ...any) {
	r.t.Helper()
	r.t.Errorf(format, args...)
}

func TestFaultsUnderLoad(t *testing.T) {
	if *seed == 0 {
		*seed = uint64(time.Now().Unix())
	}
	t.Logf("seed %d, length %s", *seed, *length)
	all, cancel := context.WithTimeout(t.Context(), *length+12*time.Minute)
	defer cancel()
	r := prepare(all, t)
	if r.long() {
		made := r.rotates(all)
		defer func() {
			certificates, authorities := made()
			t.Logf("%d certificates and %d authorities were made", certificates, authorities)
			if certificates < 6 || authorities < 1 {
				t.Error("they have not been rotated: two rounds are 6 certificates")
			}
		}()
	}

	ctx, stop := context.WithTimeout(all, *length)
	defer stop()
	begin := time.Now()
	var load sync.WaitGroup
	index := 0
	for _, mode := range modes {
		for range mode.actors {
			index++
			index := index
			random := rand.New(rand.NewPCG(*seed, uint64(index)))
			load.Go(func() { r.actor(ctx, all, random, prefix+mode.name, index) })
		}
	}
	if err := r.breakThings(ctx, all, rand.New(rand.NewPCG(*seed, 0))); err != nil {
		r.fail("%v", err)
	}
	stop()
	load.Wait()
	t.Logf("all pods have ended after %s", time.Since(begin).Round(time.Second))
	if err := r.works(all); err != nil {
		r.fail("%v", err)
	}
	r.nothingIsLeft(all)
	r.judge()
}

// long says whether the run is long enough for what takes minutes to be over.
func (r *run) long() bool { return *length >= 4*time.Minute }

// prepare makes the namespaces, who acts in them, and a pod that answers whether the guard works; and starts the observer.
func prepare(ctx context.Context, t *testing.T) *run {
	t.Helper()
	r := &run{t: t, counts: map[string]map[string]int{}}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	var err error
	r.cluster, err = incident.Open(ctx, repo)
	must(err)
	must(unfilter(ctx))
	// Whatever else goes wrong, the network is as it was.
	t.Cleanup(func() {
		if err := unfilter(context.Background()); err != nil {
			t.Error(err)
		}
	})
	r.intern, err = actAs(r.cluster, internName)
	must(err)
	r.operator, err = actAs(r.cluster, operatorName)
	must(err)
	must(removeInterrupted(ctx, r.cluster))
	namespaces := []string{prefix + "canary"}
	for _, mode := range modes {
		namespaces = append(namespaces, prefix+mode.name)
	}
	for _, name := range namespaces {
		mode := strings.TrimPrefix(name, prefix)
		if mode == "canary" {
			mode = "deny"
		}
		must(r.cluster.Namespace(ctx, name, map[string]string{"eni-guard.io/mode": mode}))
		for role, user := range map[string]string{"admin": internName, "eni-guard-override": operatorName} {
			must(bind(ctx, r.cluster, name, role, user))
		}
		must(bind(ctx, r.cluster, name, "admin", operatorName))
	}
	r.canary, err = r.cluster.Start(ctx, incident.Pod(prefix+"canary", "canary", []string{"sleep", "86400"}, nil))
	must(err)

	watching, stop := context.WithCancel(context.WithoutCancel(ctx))
	var wait func()
	r.observer, wait = observer.Start(watching, r.cluster, prefix, r.owners)
	t.Cleanup(func() {
		stop()
		wait()
	})
	must(r.works(ctx))
	return r
}

// removeInterrupted removes what a run that was interrupted has left.
func removeInterrupted(ctx context.Context, cluster *incident.Cluster) error {
	frozen, err := filepath.Glob(frozenGroups + "*/freezer.state")
	for _, file := range frozen {
		err = errors.Join(err, os.WriteFile(file, []byte("THAWED"), 0o600))
	}
	list, failed := cluster.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err = errors.Join(err, failed); err != nil {
		return err
	}
	for _, namespace := range list.Items {
		if strings.HasPrefix(namespace.Name, family) {
			err = errors.Join(err, cluster.RemoveNamespace(ctx, namespace.Name))
		}
	}
	return err
}

func bind(ctx context.Context, cluster *incident.Cluster, namespace, role, user string) error {
	_, err := cluster.RbacV1().RoleBindings(namespace).Create(ctx, &rbacv1.RoleBinding{
		ObjectMeta: metav1.ObjectMeta{GenerateName: role + "-"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: user}},
	}, metav1.CreateOptions{})
	return err
}

// actAs returns a client for a user.
func actAs(cluster *incident.Cluster, user string) (kubernetes.Interface, error) {
	config, err := clientcmd.BuildConfigFromFlags("", cluster.Kubeconfig())
	if err != nil {
		return nil, err
	}
	config.Impersonate.UserName = user
	config.QPS, config.Burst = 200, 400
	config.WarningHandler = rest.NoWarnings{}
	return kubernetes.NewForConfig(config)
}

// owners reads eni-sim's records.
func (r *run) owners(ctx context.Context) (map[netip.Addr]string, error) {
	addresses, err := r.cluster.Addresses(ctx)
	if err != nil {
		return nil, err
	}
	owners := map[netip.Addr]string{}
	for _, record := range addresses.Pods {
		for _, text := range []string{record.IPv4, record.IPv6} {
			if address, err := netip.ParseAddr(text); err == nil {
				owners[address] = record.Pod
			}
		}
	}
	return owners, nil
}

// nothingIsLeft removes what is left of the run, in which nothing may be stuck any more, and fails if a pod or a finalizer
// stays.
func (r *run) nothingIsLeft(ctx context.Context) {
	pods, err := r.cluster.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		r.fail("%v", err)
		return
	}
	for _, pod := range pods.Items {
		if slices.Contains(pod.Finalizers, finalizer) {
			r.fail("pod %s/%s has the finalizer", pod.Namespace, pod.Name)
		}
		if strings.HasPrefix(pod.Namespace, prefix) && pod.UID != r.canary.UID {
			r.fail("pod %s/%s is left, phase %s", pod.Namespace, pod.Name, pod.Status.Phase)
		}
	}
	for _, mode := range modes {
		if err := r.cluster.RemoveNamespace(ctx, prefix+mode.name); err != nil {
			r.fail("%v", err)
		}
	}
	if err := r.cluster.RemoveNamespace(ctx, prefix+"canary"); err != nil {
		r.fail("%v", err)
	}
	err = incident.Wait(ctx, 2*time.Minute, "the observer to hear of it", func(context.Context) error {
		if !r.observer.Judged(r.canary.UID) {
			return errors.New("it has not")
		}
		return nil
	})
	if err != nil {
		r.fail("%v", err)
	}
}

// judge holds what the observer has seen against the audit log, prints the counts, and fails if an invariant is broken.
func (r *run) judge() {
	events, err := r.cluster.AuditEvents(func(e incident.AuditEvent) bool {
		return strings.HasPrefix(e.ObjectRef.Namespace, prefix) && observer.IsRemoval(e)
	})
	if err != nil {
		r.fail("%v", err)
		return
	}
	history := observer.NewHistory(events)
	guarded := func(namespace string) bool {
		return namespace == prefix+"deny" || namespace == prefix+"hold" || namespace == prefix+"canary"
	}
	asked := func(namespace string) bool { return namespace != prefix+"off" }
	verdicts, judged := map[string]map[observer.Verdict]int{}, map[types.UID]observer.Verdict{}
	late := 0
	for _, removal := range r.observer.Removals() {
		record, accounted := history.Record(removal, guarded(removal.Pod.Namespace), operatorName)
		record.Lost = !accounted && r.lost(removal.SeenAt)
		verdict := observer.Judge(removal, record)
		judged[removal.Pod.UID] = verdict
		mode := strings.TrimPrefix(removal.Pod.Namespace, prefix)
		if verdicts[mode] == nil {
			verdicts[mode] = map[observer.Verdict]int{}
		}
		verdicts[mode][verdict]++
		if removal.Late {
			late++
		}
		switch verdict {
		case observer.Violation, observer.NotLookedAt:
			r.fail("%s", r.story(removal, verdict, record, history))
		case observer.Clean, observer.Control, observer.Overridden:
		default:
			r.t.Log(r.story(removal, verdict, record, history))
		}
		if asked(removal.Pod.Namespace) && !accounted {
			if record.Lost {
				r.count("removals without a record", "the API server was killed meanwhile")
			} else {
				r.fail("%s: nothing on record says why its object went at %s", removal.Key(), removal.SeenAt.Format(time.RFC3339Nano))
			}
		}
	}
	for _, outcome := range history.Outcomes() {
		r.count("decisions of the guard", outcome)
	}
	through, failed := history.Undecided(asked)
	for _, request := range through {
		r.fail("a forced removal went through without a decision: %s", request)
	}
	for how, n := range failed {
		for range n {
			r.count("forced requests without a decision", "answered "+how)
		}
	}
	violations := 0
	for _, s := range r.observer.SharedAddresses() {
		what := fmt.Sprintf("address %s of pod %s/%s was somebody else's too: %q", s.Address, s.User.Namespace, s.User.Name, s.Other)
		if verdict := judged[s.User.UID]; guarded(s.User.Namespace) && !verdict.Explained() {
			violations++
			r.fail("%s", what)
		} else {
			r.count("addresses in use that were given away", cmp.Or(string(verdict), "of a control"))
		}
	}
	watches, looks, longest, err := r.observer.Effort()
	if err != nil {
		r.fail("the observer could not look: %v", err)
	}
	r.print(verdicts)
	for _, of := range verdicts {
		violations += of[observer.Violation] + of[observer.NotLookedAt]
	}
	attempts, refusals, holds := 0, 0, 0
	for what, outcomes := range r.counts {
		for how, n := range outcomes {
			switch {
			case what == "decisions of the guard" && strings.HasPrefix(how, "held "):
				holds += n
			case strings.HasPrefix(how, "refused "):
				refusals += n
				attempts += n
			case isWay(what):
				attempts += n
			}
		}
	}
	controls := verdicts["off"][observer.Control] + verdicts["audit"][observer.Control]
	r.t.Logf("observer: %d looks, the longest %s; the watch began %d times, %d removals were found late", looks, longest.Round(time.Millisecond), watches, late)
	r.t.Logf("%d deletes and evictions, %d refusals, %d holds, %d outages, %d removals in the controls that would have been violations, %d VIOLATIONS (seed %d)",
		attempts, refusals, holds, len(r.outages), controls, violations, *seed)
	if refusals == 0 || holds == 0 || len(r.outages) == 0 {
		r.fail("that is no load, or nothing was broken")
	}
	if controls == 0 {
		r.fail("no violation was seen where the guard does not stand in the way: the observer is blind, or the load too light")
	}
}

// lost says whether the API server, or what is behind it, was killed around a time: then it may have removed an
// object and written nothing about it.
func (r *run) lost(at time.Time) bool {
	return slices.ContainsFunc(r.outages, func(o outage) bool {
		return (strings.Contains(o.name, "kube-apiserver") || strings.Contains(o.name, "etcd")) && at.After(o.begin.Add(-2*time.Second)) && at.Before(o.end.Add(2*time.Second))
	})
}

// story tells everything that is known of a removal.
func (r *run) story(removal observer.Removal, verdict observer.Verdict, record observer.Record, history *observer.History) string {
	at := func(t time.Time) string { return t.UTC().Format("15:04:05.000") }
	return fmt.Sprintf("%s: %s: started %s, request from %s to %s, gone by %s, at %s %s; reason %q, decisions %s", removal.Key(), verdict, at(removal.StartedAt),
		at(record.Received), at(record.Completed), at(removal.SeenAt), at(removal.LastBound), removal.Evidence, record.Reason, words(history.Decisions(removal)))
}

func words(decisions []observer.Decision) string {
	var all []string
	for _, d := range decisions {
		all = append(all, fmt.Sprintf("%s %s by %s at %s (%d)", d.Outcome, d.Reason, d.Actor(), d.StageTimestamp.Format(time.RFC3339Nano), d.ResponseStatus.Code))
	}
	return "[" + strings.Join(all, "; ") + "]"
}

// print tells the counts.
func (r *run) print(verdicts map[string]map[observer.Verdict]int) {
	table := func(title string, rows map[string]int) {
		var cells []string
		for _, name := range slices.Sorted(maps.Keys(rows)) {
			cells = append(cells, fmt.Sprintf("%s %d", name, rows[name]))
		}
		r.t.Logf("%s: %s", title, strings.Join(cells, ", "))
	}
	for _, what := range slices.Sorted(maps.Keys(r.counts)) {
		table(what, r.counts[what])
	}
	faults := map[string]int{}
	for _, o := range r.outages {
		for name := range strings.SplitSeq(o.name, " + ") {
			faults[name]++
		}
	}
	table("faults", faults)
	for _, mode := range slices.Sorted(maps.Keys(verdicts)) {
		rows := map[string]int{}
		for verdict, n := range verdicts[mode] {
			rows[string(verdict)] = n
		}
		table("removals in mode "+mode, rows)
	}
}
