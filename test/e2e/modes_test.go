package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// The API server itself leaves a namespace out whose mode is off.
func TestANamespaceThatIsOffMakesNoCall(t *testing.T) {
	quiet(t)
	ns := namespace(t)
	kubectl(t, ns, "label", "namespace", ns, "eni-guard.io/mode=off")
	one, two := sleeper(t, ns, "web-0", nil), sleeper(t, ns, "web-1", nil)
	before := webhookCalls(t)
	wentThrough(t, forceDelete(t, one))
	wentThrough(t, cluster.Gone(t.Context(), one))
	wentThrough(t, byForcedEviction.take(t.Context(), cluster, two))
	wentThrough(t, cluster.Gone(t.Context(), two))
	if after := webhookCalls(t); after != before {
		t.Errorf("%d calls", after-before)
	}
	removals, err := cluster.Removals(one)
	if err != nil || len(removals) == 0 {
		t.Errorf("the audit log holds %d removals (%v)", len(removals), err)
	}
	if all := records(t, one); len(all) != 0 {
		t.Errorf("decided: %v", all)
	}
}

// To see what the guard would refuse, before it does: the person, the audit log, the Events and the metrics are all told.
func TestModeAuditLetsThroughAndTells(t *testing.T) {
	quiet(t)
	ns := moded(t, "audit")
	pod := sleeper(t, ns, "web-0", nil)
	const metric = `eni_guard_decisions_total{decision="audited",mode="audit",path="delete",verdict="bound"}`
	grown := counted(t, metric)
	out := kubectl(t, ns, "delete", "pod", pod.Name, "--grace-period=0", "--force")
	wentThrough(t, cluster.Gone(t.Context(), pod))
	if !strings.Contains(out, "Warning: eni-guard would refuse this, but only records it: pod "+ns+"/web-0 is still alive on node node-1: ") {
		t.Errorf("kubectl prints:\n%s", out)
	}
	if evidence := decided(t, pod, "audit delete audited bound SandboxBound").fields["evidence"]; !strings.Contains(evidence, pod.Status.PodIP) && !strings.Contains(evidence, "did not run") {
		t.Errorf("the evidence is %q", evidence)
	}
	oneEvent(t, pod, "ForcedRemovalAudited", corev1.EventTypeWarning)
	grown()
}

// The command goes through, as its author wants; the object stays, as everybody else needs.
func TestAHeldStuckPodSaysWhyAndGoesWhenItIsReleased(t *testing.T) {
	t.Parallel()
	ns := moded(t, "hold")
	stuck := stuckFS(t, ns)
	pod := start(t, stuck.StuckPod(ns, "web-0"))
	if _, err := incident.AwaitStuck(t.Context(), pod, "S"); err != nil {
		t.Fatal(err)
	}
	out := kubectl(t, ns, "delete", "pod", pod.Name, "--grace-period=0", "--force", "--wait=false")
	if !strings.Contains(out, "Warning: held until its node has let go of it: pod "+ns+"/web-0 is still alive on node node-1: ") {
		t.Errorf("kubectl prints:\n%s", out)
	}
	process := inStateD(t, pod)
	decided(t, pod, "hold delete held bound SandboxBound")
	// At first something else was found of it; what describe says is brought up to date.
	for _, part := range []string{
		"eni-guard.io/held-because:", "eni-guard.io/held-since:", fmt.Sprintf("process %d (dd) is in state D", process.PID), "ForcedRemovalHeld", pod.Status.PodIP,
	} {
		err := incident.Wait(t.Context(), 2*time.Minute, "kubectl describe to say "+part, func(ctx context.Context) error {
			out, err := cluster.Kubectl(ctx, "-n", ns, "describe", "pod", pod.Name)
			if err == nil && !strings.Contains(out, part) {
				err = errors.New(out)
			}
			return err
		})
		wentThrough(t, err)
	}
	// The CNI's garbage collector goes by the objects in the API server.
	wentThrough(t, cluster.AwaitCollection(t.Context()))
	isHeld(t, pod)
	onTheNode(t, pod, process)
	addresses, err := cluster.Addresses(t.Context())
	if err != nil || addresses.Of(ns, pod.Name) != pod.Status.PodIP {
		t.Errorf("address %q is recorded for the held pod (%v)", addresses.Of(ns, pod.Name), err)
	}
	wentThrough(t, stuck.Release())
	wentThrough(t, cluster.AwaitGone(t.Context(), pod))
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the Event HoldReleased", func(context.Context) error {
		for _, event := range events(t, ns, pod.UID) {
			if event.Reason == "HoldReleased" && event.Type == corev1.EventTypeNormal && strings.Contains(event.Note, "nothing of it is left on node node-1") {
				return nil
			}
		}
		return errors.New("there is none")
	}))
}

// A slip of the pen must not open a namespace; and its author is told.
func TestAModeThatIsNoneLeavesTheDefaultInForce(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	kubectl(t, ns, "label", "namespace", ns, "eni-guard.io/mode=denny")
	uid := types.UID(kubectl(t, ns, "get", "namespace", ns, "-o", "jsonpath={.metadata.uid}"))
	pod := sleeper(t, ns, "web-0", nil)
	refused(t, forceDelete(t, pod), "is still alive")
	decided(t, pod, "deny delete denied bound SandboxBound")
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "an Event about the namespace", func(context.Context) error {
		found := events(t, "default", uid)
		if len(found) == 0 || found[0].Reason != "InvalidMode" || found[0].Regarding.Kind != "Namespace" || !strings.Contains(found[0].Note, `"denny" is not a mode: use deny, hold, audit or off`) {
			return fmt.Errorf("there are %d: %v", len(found), found)
		}
		return nil
	}))
	replicas := awaitLog(t, func(line logLine) string {
		if line.Msg == "a namespace has a label that is no mode" && line.Value == "denny" {
			return line.Namespace
		}
		return ""
	}, ns)[ns]
	// Only the leader looks after namespaces: one that is new to it, and one whose label has changed.
	if len(replicas) > 2 {
		t.Errorf("%q say so", replicas)
	}
}

// There and back, while the pod runs. Each time the new mode counts from the moment its label is there, give or take the
// moment in which the replicas learn of it.
func TestAModeThatChangesTakesEffect(t *testing.T) {
	t.Parallel()
	ns := namespace(t)
	pod := sleeper(t, ns, "web-0", nil)
	dryRun := metav1.DeleteOptions{GracePeriodSeconds: forced.GracePeriodSeconds, DryRun: []string{metav1.DryRunAll}}
	for _, mode := range []string{"audit", "deny", "hold", "audit", "off", "", "hold", "denny", "deny"} {
		if mode == "" {
			kubectl(t, ns, "label", "namespace", ns, "eni-guard.io/mode-")
		} else {
			kubectl(t, ns, "label", "namespace", ns, "eni-guard.io/mode="+mode, "--overwrite")
		}
		want := map[string]string{
			"audit": "audit audited", "deny": "deny denied", "hold": "hold held", "": "deny denied", "denny": "deny denied", "off": "off",
		}[mode]
		err := incident.Wait(t.Context(), 2*time.Minute, fmt.Sprintf("the mode %q to take effect", mode), func(ctx context.Context) error {
			count := len(records(t, pod))
			err := cluster.CoreV1().Pods(ns).Delete(ctx, pod.Name, dryRun)
			all := records(t, pod)
			got := "off"
			if len(all) > count {
				fields := all[len(all)-1].fields
				got = fields["mode"] + " " + fields["decision"]
			}
			if got != want || (err != nil) != strings.HasSuffix(want, "denied") {
				return fmt.Errorf("the answer is %q, %w", got, err)
			}
			return nil
		})
		wentThrough(t, err)
		asItWas(t, pod)
	}
}

// The API server asks at least twice about a removal that goes through. Whoever counts must not.
func TestOneRemovalIsOneDecision(t *testing.T) {
	quiet(t)
	for _, c := range []struct {
		name, mode string
		// take takes the pod away, by DELETE.
		take           func(t *testing.T, ns string) *corev1.Pod
		decided, event string
	}{
		{"released", "deny", func(t *testing.T, ns string) *corev1.Pod {
			pod := start(t, incident.Pod(ns, "job-1", []string{"true"}, func(p *corev1.Pod) { p.Spec.RestartPolicy = corev1.RestartPolicyNever }))
			wentThrough(t, cluster.AwaitFinished(t.Context(), pod))
			awaitReleased(t, pod)
			wentThrough(t, forceDelete(t, pod))
			return pod
		}, "deny delete allowed released SandboxReleased", "ForcedRemovalAllowed"},
		{"audited", "audit", func(t *testing.T, ns string) *corev1.Pod {
			pod := sleeper(t, ns, "web-0", nil)
			wentThrough(t, forceDelete(t, pod))
			return pod
		}, "audit delete audited bound SandboxBound", "ForcedRemovalAudited"},
		{"held", "hold", func(t *testing.T, ns string) *corev1.Pod {
			pod := sleeper(t, ns, "web-0", nil)
			wentThrough(t, forceDelete(t, pod))
			return pod
		}, "hold delete held bound SandboxBound", "ForcedRemovalHeld"},
		{"overridden", "deny", func(t *testing.T, ns string) *corev1.Pod {
			pod := sleeper(t, ns, "web-0", nil)
			annotate(t, pod, overrideAnnotation, "the node is powered off")
			wentThrough(t, forceDelete(t, pod))
			return pod
		}, "deny delete overridden bound Override", "ForcedRemovalOverridden"},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns := moded(t, c.mode)
			before := webhookCalls(t)
			pod := c.take(t, ns)
			if calls := webhookCalls(t) - before; calls < 2 {
				t.Errorf("%d calls: this test is about removals that make several", calls)
			}
			decided(t, pod, c.decided)
			// Those of the dry runs, which ask whether the time has come, have no Event.
			lines := awaitLog(t, func(line logLine) string {
				if line.Msg == "decision" && !line.DryRun {
					return line.PodUID
				}
				return ""
			}, string(pod.UID))
			oncePerReplica(t, "lines of the log about one removal", lines[string(pod.UID)])
			count := 0
			for _, record := range records(t, pod) {
				if record.fields["decision"] == strings.Fields(c.decided)[2] && record.ResponseStatus.Code == 200 && !record.DryRun() {
					count++
				}
			}
			if count != 1 {
				t.Errorf("%d records in the audit log about one removal", count)
			}
			kind := corev1.EventTypeWarning
			if c.name == "released" {
				kind = corev1.EventTypeNormal
			}
			oneEvent(t, pod, c.event, kind)
		})
	}
}

// However many pods one request takes away: its one audit event has every single decision.
func TestCollectionDeletesOfManyPodsAreRecordedOneByOne(t *testing.T) {
	quiet(t)
	t.Run("audit", func(t *testing.T) {
		deleteAll(t, "audit", 20, "audited", "ForcedRemovalAudited", nil, func(t *testing.T, pods []corev1.Pod) {
			for _, pod := range pods {
				if err := cluster.Gone(t.Context(), &pod); err != nil {
					t.Errorf("pod %s: %v", pod.Name, err)
				}
			}
		})
	})
	t.Run("hold", func(t *testing.T) {
		var all []corev1.Pod
		// With the guard's own pods, and the one that is stuck, the node has 110.
		deleteAll(t, "hold", 106, "held", "ForcedRemovalHeld", oneStuckPodAmongThem, func(t *testing.T, pods []corev1.Pod) {
			all = pods
			// The mark tells the kubelet to end them; it gets around to one after the other.
			list, err := cluster.CoreV1().Pods(pods[0].Namespace).List(t.Context(), metav1.ListOptions{})
			wentThrough(t, err)
			for _, pod := range list.Items {
				if !held(&pod) || pod.DeletionTimestamp == nil {
					t.Errorf("pod %s: deletion %v, finalizers %v", pod.Name, pod.DeletionTimestamp, pod.Finalizers)
				}
			}
		})
		for _, pod := range all {
			wentThrough(t, cluster.AwaitGone(t.Context(), &pod))
		}
		released := awaitLog(t, func(line logLine) string {
			if line.Msg == "freed a held pod" && line.Reason == "SandboxReleased" {
				return line.PodUID
			}
			return ""
		}, uids(all)...)
		for _, pod := range all {
			if replicas := released[string(pod.UID)]; len(replicas) != 1 {
				t.Errorf("%q tell of the release of pod %s", replicas, pod.Name)
			}
		}
	})
}

// atOnce is how many pods one request of these tests deletes at most. The API server ends a request after a minute, and holds one pod after
// another.
const atOnce = 53

// deleteAll starts pods in a namespace of a mode, deletes them with as few requests as atOnce allows, and looks for the traces of every one.
// Right after the requests it calls then.
func deleteAll(t *testing.T, mode string, count int, decision, reason string, before func(*testing.T), then func(t *testing.T, pods []corev1.Pod)) {
	t.Helper()
	ns := moded(t, mode)
	for i := range count {
		// Killed at once after the delete, and started in bulk: this is about the records.
		pod := incident.Pod(ns, fmt.Sprintf("web-%03d", i), []string{"sleep", "86400"}, func(p *corev1.Pod) {
			p.Labels = map[string]string{"request": strconv.Itoa(i / atOnce)}
		})
		if _, err := cluster.CoreV1().Pods(ns).Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	var pods []corev1.Pod
	wentThrough(t, incident.Wait(t.Context(), 6*time.Minute, "the pods to run", func(ctx context.Context) error {
		list, err := cluster.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{FieldSelector: "status.phase=Running"})
		if err != nil {
			return err
		}
		if pods = list.Items; len(pods) != count {
			return fmt.Errorf("%d do", len(pods))
		}
		return nil
	}))
	if before != nil {
		before(t)
	}
	requests := (count-1)/atOnce + 1
	begin := time.Now()
	for i := range requests {
		wentThrough(t, cluster.CoreV1().Pods(ns).DeleteCollection(t.Context(), forced, metav1.ListOptions{LabelSelector: fmt.Sprintf("request=%d", i)}))
	}
	t.Logf("%d pods were deleted in %s, with %d requests", count, time.Since(begin).Round(100*time.Millisecond), requests)
	then(t, pods)

	// In the order of the requests.
	audited, err := cluster.AuditEvents(func(e incident.AuditEvent) bool { return e.Verb == "deletecollection" && e.ObjectRef.Namespace == ns })
	if err != nil || len(audited) != requests {
		t.Fatalf("%d collection deletes in the audit log (%v), want %d", len(audited), err, requests)
	}
	complete := 0
	for _, pod := range pods {
		request, err := strconv.Atoi(pod.Labels["request"])
		wentThrough(t, err)
		fields := fieldsOf(t, audited[request], pod.UID)
		got := strings.Join([]string{fields["decision"], fields["verdict"], fields["mode"], fields["path"], fields["pod"], fields["pod-ips"]}, " ")
		if want := decision + " bound " + mode + " collection " + ns + "/" + pod.Name + " " + pod.Status.PodIP; got != want {
			t.Errorf("the record of pod %s: %q, not %q", pod.Name, got, want)
		}
		// The whole of it, to its last word. A node this busy may not be able to tell all in time, but then says what it has not
		// looked at.
		evidence := fields["evidence"]
		whole := true
		for _, part := range []struct{ words, probe string }{{"container app ", "runtime"}, {pod.Status.PodIP, "netns"}} {
			if !strings.Contains(evidence, part.words) {
				whole = false
				if !strings.Contains(evidence, fmt.Sprintf("the probe %q did not run", part.probe)) {
					t.Errorf("the evidence about pod %s has no %q: %q", pod.Name, part.words, evidence)
				}
			}
		}
		if whole {
			complete++
		}
		if strings.Contains(evidence, "…") {
			t.Errorf("the evidence about pod %s is cut off: %q", pod.Name, evidence)
		}
	}
	if complete < count/2 {
		t.Errorf("the evidence about %d of %d pods is whole", complete, count)
	}
	lines := awaitLog(t, func(line logLine) string {
		if line.Msg == "decision" {
			return line.PodUID
		}
		return ""
	}, uids(pods)...)
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the Events about the pods", func(context.Context) error {
		told := map[types.UID]bool{}
		for _, event := range events(t, ns, "") {
			if event.ReportingController == "eni-guard" && event.Reason == reason && event.Action == "collection" {
				told[event.Regarding.UID] = true
			}
		}
		if len(told) != count {
			return fmt.Errorf("there are some about %d", len(told))
		}
		return nil
	}))
	for _, pod := range pods {
		oncePerReplica(t, "lines of the log about pod "+pod.Name, lines[string(pod.UID)])
		oneEvent(t, &pod, reason, corev1.EventTypeWarning)
	}
}

// logLine is what the tests read of a line of the webhook's log.
type logLine struct {
	Msg, Decision, Reason, Path, Namespace, Value, PodUID, Level string
	DryRun                                                       bool
	// replica is the pod that has written it.
	replica string
}

// webhookLog reads the logs of all replicas.
func webhookLog(t *testing.T) []logLine {
	t.Helper()
	out := kubectl(t, incident.GuardNamespace, "logs", "-l", "app.kubernetes.io/component=webhook", "--tail=-1", "--prefix")
	var lines []logLine
	for prefixed := range strings.Lines(out) {
		prefix, text, _ := strings.Cut(prefixed, " ")
		line := logLine{replica: prefix}
		if err := json.Unmarshal([]byte(text), &line); err != nil {
			t.Fatalf("a line of the log is not JSON: %v\n%s", err, text)
		}
		lines = append(lines, line)
	}
	return lines
}

// awaitLog waits until the logs of the webhook have a line about each of things, and returns by which replicas those about each are. A line gets
// there a moment after it is written. about says what a line is about, or nothing.
func awaitLog(t *testing.T, about func(logLine) string, things ...string) map[string][]string {
	t.Helper()
	var replicas map[string][]string
	wentThrough(t, incident.Wait(t.Context(), time.Minute, "the logs of the webhook to tell of everything", func(context.Context) error {
		replicas = map[string][]string{}
		for _, line := range webhookLog(t) {
			replicas[about(line)] = append(replicas[about(line)], line.replica)
		}
		for _, thing := range things {
			if len(replicas[thing]) == 0 {
				return errors.New("nothing is told of " + thing)
			}
		}
		return nil
	}))
	return replicas
}

func uids(pods []corev1.Pod) []string {
	var all []string
	for _, pod := range pods {
		all = append(all, string(pod.UID))
	}
	return all
}

// events returns the Events in a namespace about an object; about any if uid is empty.
func events(t *testing.T, ns string, uid types.UID) []eventsv1.Event {
	t.Helper()
	list, err := cluster.EventsV1().Events(ns).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var found []eventsv1.Event
	for _, event := range list.Items {
		if uid == "" || event.Regarding.UID == uid {
			found = append(found, event)
		}
	}
	return found
}

// removalEvents waits for the guard's Events about the removal of a pod.
func removalEvents(t *testing.T, pod *corev1.Pod) []eventsv1.Event {
	t.Helper()
	var found []eventsv1.Event
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "an Event about pod "+pod.Name, func(context.Context) error {
		found = nil
		for _, event := range events(t, pod.Namespace, pod.UID) {
			if event.ReportingController == "eni-guard" && strings.HasPrefix(event.Reason, "ForcedRemoval") {
				found = append(found, event)
			}
		}
		if len(found) == 0 {
			return errors.New("there is none")
		}
		return nil
	}))
	return found
}

// oncePerReplica fails the test unless something was told, and by no replica of the webhook twice. The calls of one removal reach one replica,
// unless that was not ready for a moment: then another one judges it too.
func oncePerReplica(t *testing.T, what string, replicas []string) {
	t.Helper()
	slices.Sort(replicas)
	if len(replicas) == 0 || len(slices.Compact(slices.Clone(replicas))) != len(replicas) {
		t.Errorf("%d %s, by %q", len(replicas), what, replicas)
	}
}

// oneEvent fails the test unless what is told about the removal of a pod is this Event, once.
func oneEvent(t *testing.T, pod *corev1.Pod, reason, kind string) {
	t.Helper()
	found := removalEvents(t, pod)
	var replicas []string
	for _, event := range found {
		replicas = append(replicas, event.ReportingInstance)
		if event.Series != nil || event.Reason != reason || event.Type != kind {
			t.Errorf("an Event about pod %s is %s %s %q, repeated: %v", pod.Name, event.Type, event.Reason, event.Note, event.Series)
		}
	}
	oncePerReplica(t, "Events about pod "+pod.Name, replicas)
}

// counted returns what fails the test unless a counter has grown since, by one at each replica that has counted at all.
func counted(t *testing.T, metric string) func() {
	t.Helper()
	before := metricOf(t, metric)
	return func() {
		t.Helper()
		var replicas []string
		for replica, value := range metricOf(t, metric) {
			for range int(value - before[replica]) {
				replicas = append(replicas, replica)
			}
		}
		oncePerReplica(t, "times "+metric+" has grown", replicas)
	}
}

// metricOf returns a metric, named as the exposition has it, labels in order, of each replica of the webhook that has it.
func metricOf(t *testing.T, metric string) map[string]float64 {
	t.Helper()
	replicas, err := cluster.CoreV1().Pods(incident.GuardNamespace).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=webhook"})
	if err != nil || len(replicas.Items) == 0 {
		t.Fatalf("%d replicas (%v)", len(replicas.Items), err)
	}
	values := map[string]float64{}
	for _, replica := range replicas.Items {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+net.JoinHostPort(replica.Status.PodIP, "8080")+"/metrics", nil)
		if err != nil {
			t.Fatal(err)
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(response.Body)
		for lines.Scan() {
			if text, ok := strings.CutPrefix(lines.Text(), metric+" "); ok {
				value, err := strconv.ParseFloat(text, 64)
				if err != nil {
					t.Error(err)
				}
				values[replica.Name] = value
			}
		}
		if err := errors.Join(lines.Err(), response.Body.Close()); err != nil {
			t.Error(err)
		}
	}
	return values
}
