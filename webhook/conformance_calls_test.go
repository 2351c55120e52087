//go:build conformance

package webhook

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// user is who sends a request.
type user struct {
	name   string
	groups []string
}

var (
	// alice may do anything with pods, and nothing else; bob may override too.
	alice        = user{name: "alice"}
	bob          = user{name: "bob"}
	guardAccount = user{name: "system:serviceaccount:eni-guard:eni-guard-webhook", groups: []string{"system:serviceaccounts"}}
	ownKubelet   = user{name: "system:node:node-a", groups: []string{"system:nodes"}}
	otherKubelet = user{name: "system:node:node-b", groups: []string{"system:nodes"}}
)

// grantRights gives all users all rights on pods, and bob the right to override.
func (s *apiServer) grantRights(t *testing.T) {
	t.Helper()
	pods := []string{"pods", "pods/status", "pods/ephemeralcontainers", "pods/eviction"}
	roles, bindings := s.RbacV1().ClusterRoles(), s.RbacV1().ClusterRoleBindings()
	for name, grant := range map[string]struct {
		rule    rbacv1.PolicyRule
		subject rbacv1.Subject
	}{
		"pods": {
			rbacv1.PolicyRule{APIGroups: []string{""}, Resources: pods, Verbs: []string{"*"}},
			rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: "system:authenticated"},
		},
		"override": {
			rbacv1.PolicyRule{APIGroups: []string{"eni-guard.io"}, Resources: []string{"forcedeletes"}, Verbs: []string{"override"}},
			rbacv1.Subject{APIGroup: rbacv1.GroupName, Kind: rbacv1.UserKind, Name: bob.name},
		},
	} {
		role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "test-" + name}, Rules: []rbacv1.PolicyRule{grant.rule}}
		if _, err := roles.Create(t.Context(), role, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		binding := &rbacv1.ClusterRoleBinding{
			ObjectMeta: role.ObjectMeta,
			RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role.Name},
			Subjects:   []rbacv1.Subject{grant.subject},
		}
		if _, err := bindings.Create(t.Context(), binding, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}

// expectation is one request, and the calls that must come of it.
type expectation struct {
	name    string
	pod     *corev1.Pod
	user    user
	request request
	// configurations are those that call, as recorder.configurations names them.
	configurations string
	// path is what every call must be read as.
	path Path
}

// hold sends the requests and compares.
func (s *apiServer) hold(t *testing.T, expectations []expectation) {
	t.Helper()
	start := time.Now()
	pods := make([]*corev1.Pod, 0, len(expectations))
	for i := range expectations {
		e := &expectations[i]
		e.request.user, e.request.groups = e.user.name, e.user.groups
		pods = append(pods, e.pod)
	}
	s.store(t, pods...)
	answers, failures := make([]int, len(expectations)), make([]error, len(expectations))
	inParallel(len(expectations), func(i int) { answers[i], failures[i] = s.send(t.Context(), expectations[i].request) })
	var found disagreements
	for i, e := range expectations {
		name := fmt.Sprintf("%s, by %s (%s)", e.name, e.user.name, e.pod.Name)
		if answers[i] != http.StatusOK && answers[i] != http.StatusCreated {
			found.add("%s: answered with %d: %v", name, answers[i], failures[i])
		}
		if got := s.calls.configurations(e.pod); got != e.configurations {
			found.add("%s: calls by %s, want %s", name, got, e.configurations)
		}
		for _, call := range s.calls.of(e.pod, failClosed, failOpen) {
			if call.err != nil {
				found.add("%s: a call by %s was not understood: %v", name, call.configuration, call.err)
				continue
			}
			if call.path != e.path || call.user.Username != e.user.name {
				found.add("%s: a call by %s was read as %s by %s, want %s", name, call.configuration, call.path, call.user.Username, e.path)
			}
		}
	}
	found.report(t)
	spent := time.Since(start).Round(time.Millisecond)
	t.Logf("%d requests to %s in %s: %d disagreements", len(expectations), s.version, spent, len(found.lines))
}

// updates are the changes to a pod that the UPDATE conditions tell apart.
var updates = []struct {
	name  string
	apply func(*corev1.Pod)
}{
	{"adding the label", addIgnoreLabel},
	{"adding the label with the value false", func(pod *corev1.Pod) { setLabel(pod, IgnoreLabel, "false") }},
	{"adding another label", func(pod *corev1.Pod) { setLabel(pod, "example.com/other", "true") }},
	{"taking the label away", func(pod *corev1.Pod) { delete(pod.Labels, IgnoreLabel) }},
	{"taking the guard's finalizer", takeFinalizer(Finalizer)},
	{"taking another finalizer", takeFinalizer("example.com/kept")},
	{"writing phase Failed", phase(corev1.PodFailed)},
	{"writing phase Succeeded", phase(corev1.PodSucceeded)},
	{"adding the label and taking the guard's finalizer", func(pod *corev1.Pod) { addIgnoreLabel(pod); takeFinalizer(Finalizer)(pod) }},
	{"adding the label and writing phase Failed", func(pod *corev1.Pod) { addIgnoreLabel(pod); pod.Status.Phase = corev1.PodFailed }},
	{"taking the guard's finalizer and writing phase Failed", func(pod *corev1.Pod) {
		takeFinalizer(Finalizer)(pod)
		pod.Status.Phase = corev1.PodFailed
	}},
}

func addIgnoreLabel(pod *corev1.Pod) { setLabel(pod, IgnoreLabel, "true") }

func setLabel(pod *corev1.Pod, key, value string) {
	if pod.Labels == nil {
		pod.Labels = map[string]string{}
	}
	pod.Labels[key] = value
}

func takeFinalizer(name string) func(*corev1.Pod) {
	return func(pod *corev1.Pod) {
		pod.Finalizers = slices.DeleteFunc(pod.Finalizers, func(f string) bool { return f == name })
	}
}

// testUpdates holds the conditions about UPDATE against what removalOf makes of the same change.
func (s *apiServer) testUpdates(t *testing.T) {
	var expectations []expectation
	add := func(before *corev1.Pod, by user, subresource, name string, change func(*corev1.Pod)) {
		wanted := before.DeepCopy()
		change(wanted)
		// What a subresource does not take, the API server takes from the stored object, before admission.
		after := wanted.DeepCopy()
		switch subresource {
		case "":
			after.Status = before.Status
		case "ephemeralcontainers":
			after = before
		}
		path, configurations := callsAboutUpdate(t, before, after, by)
		expectations = append(expectations, expectation{
			name: fmt.Sprintf("%s by UPDATE of pods/%s, of a pod that is %s, %s, labels %v, finalizers %v", name, subresource, stateOf(before),
				before.Status.Phase, before.Labels, before.Finalizers),
			pod: before, user: by, path: path, configurations: configurations,
			request: request{verb: http.MethodPut, path: strings.TrimSuffix(podPath(before)+"/"+subresource, "/"), body: wanted},
		})
	}
	for _, update := range updates {
		for _, subresource := range []string{"", "status", "ephemeralcontainers"} {
			for _, by := range []user{alice, guardAccount, ownKubelet} {
				for _, mark := range []func(*corev1.Pod){markedNever, terminating(new(int64(30))), terminating(new(int64(0))), terminating(nil)} {
					for _, reached := range []corev1.PodPhase{corev1.PodRunning, corev1.PodSucceeded} {
						for _, finalizers := range [][]string{{Finalizer}, {Finalizer, "example.com/kept"}} {
							for _, label := range []string{"", "true"} {
								pod := storedPod(callsNamespace, "update-"+strconv.Itoa(len(expectations)), mark, phase(reached))
								pod.Finalizers = slices.Clone(finalizers)
								if label != "" {
									setLabel(pod, IgnoreLabel, label)
								}
								add(pod, by, subresource, update.name, update.apply)
							}
						}
					}
				}
			}
		}
	}
	s.hold(t, expectations)
}

// callsAboutUpdate says by which configurations the webhook must be called about an UPDATE, according to the rule, and
// what it must read.
func callsAboutUpdate(t *testing.T, before, after *corev1.Pod, by user) (path Path, configurations string) {
	t.Helper()
	r, err := removalOf(updateRequest(t, before, after, ""))
	if err != nil {
		return "", "none"
	}
	var names []string
	if r.effect() == removesObject && (r.path != PathFinalizer || by.name != guardAccount.name) {
		names = append(names, failClosed)
	}
	if !terminal(before) && terminal(after) && !slices.Contains(by.groups, "system:nodes") {
		names = append(names, failOpen)
	}
	if len(names) == 0 {
		return "", "none"
	}
	return r.path, strings.Join(names, " and ")
}

// testKubelets holds that a kubelet's deletes make no call if, and only if, the pod is on its own node.
func (s *apiServer) testKubelets(t *testing.T) {
	var expectations []expectation
	nodes := ownKubelet.groups
	for _, by := range []user{
		ownKubelet, otherKubelet, {name: ownKubelet.name}, {name: "node-a", groups: nodes}, {name: "system:node:", groups: nodes}, alice,
	} {
		for _, path := range []Path{PathDelete, PathCollection} {
			for _, node := range []string{"", "node-a"} {
				for _, grace := range []int64{0, 30} {
					for _, reached := range []corev1.PodPhase{corev1.PodRunning, corev1.PodFailed} {
						pod := storedPod(callsNamespace, "kubelet-"+strconv.Itoa(len(expectations)), phase(reached))
						pod.Spec.NodeName = node
						c := &combination{path: path, dryRun: notDry, asked: &grace, pod: pod}
						configurations := failClosed
						own := node != "" && by.name == "system:node:"+node && slices.Contains(by.groups, "system:nodes")
						if own || effectOn(pod, &grace) != removesObject {
							configurations = "none"
						}
						expectations = append(expectations, expectation{
							name: fmt.Sprintf("%s with groups %v", c, by.groups),
							pod:  pod, user: by, request: c.request(), path: path, configurations: configurations,
						})
					}
				}
			}
		}
	}
	s.hold(t, expectations)
}

// testOverrides holds which removals do not depend on the webhook, because the API server itself finds them overridden,
// and that these, and only these, leave their reason in the audit log.
func (s *apiServer) testOverrides(t *testing.T) {
	reasons := []struct {
		text   string
		counts bool
	}{
		{"node-a was powered off, checked by hand", true},
		{" x ", true},
		{strings.Repeat("x", 500), true},
		{strings.Repeat("节", 500), true},
		{strings.Repeat("x", 501), false},
		{strings.Repeat("节", 501), false},
		{"", false},
		{" \t\n\u0085\u00a0\u3000", false},
	}
	ways := []struct {
		name    string
		path    Path
		request func(*corev1.Pod) request
		// overridable is false where the API server cannot tell, or has nothing to ask.
		overridable bool
		otherwise   string
	}{
		{"DELETE with grace 0", PathDelete, deletion(PathDelete, 0), true, failClosed},
		{"DELETE with grace 30", PathDelete, deletion(PathDelete, 30), false, "none"},
		{"DELETE of a collection with grace 0", PathCollection, deletion(PathCollection, 0), true, failClosed},
		{"eviction with grace 0", PathEviction, deletion(PathEviction, 0), false, failClosed},
		{"eviction with grace 30", PathEviction, deletion(PathEviction, 30), false, failOpen},
		{"adding the label", PathIgnoreLabel, change(addIgnoreLabel), true, failClosed},
		{"taking the finalizer", PathFinalizer, change(takeFinalizer(Finalizer)), true, failClosed},
	}
	var expectations []expectation
	audited := map[string]string{}
	for _, way := range ways {
		for _, by := range []user{alice, bob} {
			for _, annotated := range []bool{false, true} {
				for _, limited := range []bool{false, true} {
					for _, reason := range reasons {
						pod := storedPod(callsNamespace, "override-"+strconv.Itoa(len(expectations)))
						if way.path == PathFinalizer {
							terminating(new(int64(0)))(pod)
							pod.Finalizers = []string{Finalizer}
						}
						pod.Annotations = map[string]string{"example.com/other": "x"}
						if annotated {
							pod.Annotations[OverrideAnnotation] = reason.text
						}
						if limited {
							pod.Annotations[OverrideUntilAnnotation] = time.Now().Add(time.Hour).UTC().Format(time.RFC3339)
						}
						// The rule in Go is the same one.
						if o := overrideOf(pod, time.Now()); (o.reason != "" && o.refused == "") != (annotated && reason.counts) {
							t.Errorf("annotated %t with %.20q, until %t: overrideOf says %+v", annotated, reason.text, limited, o)
						}
						configurations := way.otherwise
						if way.overridable && annotated && reason.counts && !limited && by.name == bob.name {
							configurations = failOpen
							// In a collection delete all pods have one key.
							if way.path != PathCollection {
								// The API server trims what a policy writes.
								audited[pod.Name] = strings.TrimSpace(reason.text)
							}
						}
						expectations = append(expectations, expectation{
							name: fmt.Sprintf("%s, annotated %t with %.20q, until %t", way.name, annotated, reason.text, limited),
							pod:  pod, user: by, request: way.request(pod), path: way.path, configurations: configurations,
						})
					}
				}
			}
		}
	}
	s.hold(t, expectations)
	// A long answer may arrive before its event is written.
	s.await(t, "the reasons in the audit log", func(context.Context) (err error) {
		found := s.overridesInAudit(t)
		for _, e := range expectations {
			if got, want := found[e.pod.Name], audited[e.pod.Name]; got != want {
				err = errors.Join(err, fmt.Errorf("%s, by %s: it has %.20q, want %.20q", e.name, e.user.name, got, want))
			}
		}
		return err
	})
}

// deletion makes the request to delete a pod with a grace period.
func deletion(path Path, grace int64) func(*corev1.Pod) request {
	return func(pod *corev1.Pod) request {
		return (&combination{path: path, dryRun: notDry, asked: &grace, pod: pod}).request()
	}
}

// change makes the request to change a pod.
func change(apply func(*corev1.Pod)) func(*corev1.Pod) request {
	return func(pod *corev1.Pod) request {
		after := pod.DeepCopy()
		apply(after)
		return request{verb: http.MethodPut, path: podPath(pod), body: after}
	}
}
