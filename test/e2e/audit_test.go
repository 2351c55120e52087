package e2e

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// adminName is who the cluster's administrator is to the API server.
const adminName = "kubernetes-admin"

// recordTo is where the package review has its recorded logs, which its README says how to record anew.
var recordTo = flag.String("record", "", "a directory to write the audit log to, and what was done while it was written")

// deeds are what a test has done, in order, as the review must tell it.
type deeds struct {
	// rows are removals: "NAMESPACE/POD USER PATH DECISION OUTCOME REASON", and how the pod went afterwards, if it stayed at first and went.
	rows []string
	// weakened are changes that leave the guard weaker: "USER OBJECT: WHAT".
	weakened []string
}

// done notes a removal and takes its error, which must be one exactly if the pod is to be where it was.
func (d *deeds) done(t *testing.T, pod *corev1.Pod, user, path, decision, outcome, reason string, err error) {
	t.Helper()
	if stays := outcome == "refused" || outcome == "failed"; stays != (err != nil) {
		t.Errorf("%s of %s by %s, to be %s: %v", path, pod.Name, user, outcome, err)
	}
	d.rows = append(d.rows, strings.Join([]string{pod.Namespace + "/" + pod.Name, user, path, decision, outcome, reason}, " "))
}

// went notes how the pod of the last removal of that name went after all.
func (d *deeds) went(pod *corev1.Pod, how string) {
	for i, row := range slices.Backward(d.rows) {
		if strings.HasPrefix(row, pod.Namespace+"/"+pod.Name+" ") {
			d.rows[i] += " " + how
			return
		}
	}
}

func (d *deeds) weaken(object, what string) {
	d.weakened = append(d.weakened, adminName+" "+object+": "+what)
}

// removeInEveryWay removes pods in every way that the review tells apart.
func removeInEveryWay(t *testing.T) (d deeds, namespaces []string) {
	t.Helper()
	ctx := t.Context()
	deny, hold, audit, off := moded(t, "deny"), moded(t, "hold"), moded(t, "audit"), moded(t, "off")
	namespaces = []string{deny, hold, audit, off}
	d.weaken("namespace "+audit, "mode audit")
	d.weaken("namespace "+off, "mode off")
	intern, operator := people(t, deny)
	d.weaken("rolebinding "+deny+"/override", "the right to override for User "+operatorName)
	label := map[string]string{"app": "batch"}
	labelled := func(pod *corev1.Pod) { pod.Labels = label }
	onTheHost := func(pod *corev1.Pod) { pod.Spec.HostNetwork = true }
	var web []*corev1.Pod
	for i := range 8 {
		web = append(web, sleeper(t, deny, fmt.Sprintf("web-%d", i), nil))
	}
	finished := start(t, incident.Pod(deny, "job-0", []string{"true"}, func(pod *corev1.Pod) { pod.Spec.RestartPolicy = corev1.RestartPolicyNever }))
	host, lastHost := sleeper(t, deny, "host-0", onTheHost), sleeper(t, deny, "host-1", onTheHost)
	toHold := sleeper(t, hold, "web-0", nil)
	toAudit, toLabel := sleeper(t, audit, "web-0", nil), sleeper(t, audit, "web-1", nil)
	batch := []*corev1.Pod{sleeper(t, audit, "batch-0", labelled), sleeper(t, audit, "batch-1", labelled), sleeper(t, audit, "batch-2", labelled)}
	kept := sleeper(t, audit, "kept-0", func(pod *corev1.Pod) { pod.Finalizers = []string{"example.com/kept"} })
	budgeted := sleeper(t, audit, "budgeted-0", func(pod *corev1.Pod) { pod.Labels = map[string]string{"app": "budgeted"} })
	disruptions(t, audit, "budgeted")
	unguarded := []*corev1.Pod{sleeper(t, off, "web-0", nil), sleeper(t, off, "web-1", nil)}

	// Refused, then told to end as the refusal advises.
	d.done(t, web[0], internName, "delete", "denied", "refused", "SandboxBound", byForcedDelete.take(ctx, intern, web[0]))
	wentThrough(t, cluster.CoreV1().Pods(deny).Delete(ctx, web[0].Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(1))}))
	wentThrough(t, cluster.AwaitGone(ctx, web[0]))
	d.went(web[0], "ended")
	// Refused, then overridden.
	d.done(t, web[1], internName, "delete", "denied", "refused", "SandboxBound", byForcedDelete.take(ctx, intern, web[1]))
	annotate(t, web[1], overrideAnnotation, "the node is on fire, ticket 4711")
	d.weaken("pod "+deny+"/"+web[1].Name, `override: "the node is on fire, ticket 4711"`)
	d.went(web[1], "forced")
	d.done(t, web[1], operatorName, "delete", "overridden", "removed", "Override", byForcedDelete.take(ctx, operator, web[1]))
	// Refused, and left alone for long.
	d.done(t, web[2], internName, "eviction", "denied", "refused", "SandboxBound", byForcedEviction.take(ctx, intern, web[2]))
	// Only asked: none of these is a removal. What was changed in dry run is no change either.
	for _, args := range [][]string{
		{"annotate", "pod", web[2].Name, overrideAnnotation + "=a question"}, {"label", "namespace", deny, "eni-guard.io/mode=off", "--overwrite"},
		{"label", "node", incident.Node, "a=b"}, {"scale", "deployment", "eni-guard-webhook", "-n", incident.GuardNamespace, "--replicas=0"},
		{"annotate", "validatingwebhookconfiguration", "eni-guard", "a=b"},
	} {
		kubectl(t, deny, append(args, "--dry-run=server")...)
	}
	err := cluster.CoreV1().Pods(deny).Delete(ctx, web[2].Name, metav1.DeleteOptions{GracePeriodSeconds: forced.GracePeriodSeconds, DryRun: []string{metav1.DryRunAll}})
	refused(t, err)
	refused(t, byForcedEvictionInDryRun.take(ctx, cluster, web[2]))
	// Let go.
	wentThrough(t, cluster.AwaitFinished(ctx, finished))
	awaitReleased(t, finished)
	d.done(t, finished, adminName, "delete", "allowed", "removed", "SandboxReleased", plainDelete(ctx, cluster, finished))
	d.done(t, host, adminName, "delete", "exempt", "removed", "HostNetwork", byForcedDelete.take(ctx, cluster, host))
	d.done(t, toHold, adminName, "delete", "held", "held", "SandboxBound", byForcedDelete.take(ctx, cluster, toHold))
	wentThrough(t, cluster.AwaitGone(ctx, toHold))
	d.went(toHold, "freed")
	d.done(t, toAudit, adminName, "delete", "audited", "removed", "SandboxBound", byForcedDelete.take(ctx, cluster, toAudit))
	_, err = cluster.CoreV1().Pods(audit).Patch(ctx, toLabel.Name, types.MergePatchType, []byte(`{"metadata":{"labels":{"`+ignoreLabel+`":"true"}}}`), metav1.PatchOptions{})
	d.done(t, toLabel, adminName, "ignore-label", "audited", "removed", "SandboxBound", err)
	err = cluster.CoreV1().Pods(audit).DeleteCollection(ctx, forced, metav1.ListOptions{LabelSelector: "app=batch"})
	for _, pod := range batch {
		d.done(t, pod, adminName, "collection", "audited", "removed", "SandboxBound", err)
	}
	// Let through, and kept by somebody else's finalizer, until that is taken away.
	d.done(t, kept, adminName, "delete", "audited", "held", "SandboxBound", byForcedDelete.take(ctx, cluster, kept))
	_, err = cluster.CoreV1().Pods(audit).Patch(ctx, kept.Name, types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{})
	wentThrough(t, err)
	d.weaken("pod "+audit+"/"+kept.Name, "finalizers taken away")
	d.went(kept, "stripped")
	// Let through, and refused by a disruption budget.
	d.done(t, budgeted, adminName, "eviction", "audited", "failed", "SandboxBound", byForcedEviction.take(ctx, cluster, budgeted))
	// Slipped past: the guard trusts kubelets.
	kubelet := "system:node:" + incident.Node
	_, err = cluster.Kubectl(ctx, "delete", "pod", "-n", deny, web[7].Name, "--grace-period=0", "--force", "--wait=false", "--as="+kubelet, "--as-group=system:nodes")
	d.done(t, web[7], kubelet, "delete", "slipped-past", "removed", "Impersonated", err)
	// Slipped past: the namespace is off. The second request says so in its address, not in a body.
	d.done(t, unguarded[0], adminName, "delete", "slipped-past", "removed", "ModeOff", byForcedDelete.take(ctx, cluster, unguarded[0]))
	err = cluster.CoreV1().RESTClient().Delete().Namespace(off).Resource("pods").Name(unguarded[1].Name).Param("gracePeriodSeconds", "0").Do(ctx).Error()
	d.done(t, unguarded[1], adminName, "delete", "slipped-past", "removed", "ModeOff", err)

	withoutWebhook(t)
	d.weaken("deployment eni-guard/eni-guard-webhook", "replicas 0")
	d.done(t, web[3], internName, "delete", "unanswered", "refused", "WebhookDown", byForcedDelete.take(ctx, intern, web[3]))
	annotate(t, web[4], overrideAnnotation, "the whole rack is powered off")
	d.weaken("pod "+deny+"/"+web[4].Name, `override: "the whole rack is powered off"`)
	d.done(t, web[4], operatorName, "delete", "overridden", "removed", "Override", byForcedDelete.take(ctx, operator, web[4]))
	// Slipped past: nobody answers, and the configuration says not to mind.
	configurations := cluster.AdmissionregistrationV1().ValidatingWebhookConfigurations()
	original, err := configurations.Get(ctx, "eni-guard", metav1.GetOptions{})
	wentThrough(t, err)
	t.Cleanup(func() {
		err := configurations.Delete(context.Background(), original.Name, metav1.DeleteOptions{})
		if err == nil || apierrors.IsNotFound(err) {
			err = putBack(context.Background(), original)
		}
		if err != nil {
			t.Error(err)
		}
	})
	weaker := original.DeepCopy()
	ignore := admissionregistrationv1.Ignore
	weaker.Webhooks[0].FailurePolicy = &ignore
	_, err = configurations.Update(ctx, weaker, metav1.UpdateOptions{})
	wentThrough(t, err)
	d.weaken("validatingwebhookconfiguration eni-guard", "changed, failurePolicy Ignore")
	ask := metav1.DeleteOptions{GracePeriodSeconds: forced.GracePeriodSeconds, DryRun: []string{metav1.DryRunAll}}
	wentThrough(t, incident.Wait(ctx, 2*time.Minute, "the failure policy to be in force", func(ctx context.Context) error {
		return cluster.CoreV1().Pods(deny).Delete(ctx, web[5].Name, ask)
	}))
	d.done(t, web[5], internName, "delete", "slipped-past", "removed", "WebhookDown", byForcedDelete.take(ctx, intern, web[5]))
	// Slipped past: there is no configuration.
	wentThrough(t, configurations.Delete(ctx, original.Name, metav1.DeleteOptions{}))
	d.weaken("validatingwebhookconfiguration eni-guard", "deleted")
	wentThrough(t, incident.Wait(ctx, 2*time.Minute, "the API server to forget the configuration", func(ctx context.Context) error {
		if err := cluster.CoreV1().Pods(deny).Delete(ctx, web[6].Name, ask); err != nil {
			return err
		}
		questions, err := cluster.Removals(web[6])
		if err != nil {
			return err
		}
		for key := range questions[len(questions)-1].Annotations {
			if strings.HasPrefix(key, "failed-open.") {
				return errors.New("it still knows it")
			}
		}
		return nil
	}))
	d.done(t, web[6], internName, "delete", "slipped-past", "removed", "ConfigurationDeleted", byForcedDelete.take(ctx, intern, web[6]))
	d.done(t, lastHost, adminName, "delete", "exempt", "removed", "HostNetwork", byForcedDelete.take(ctx, cluster, lastHost))
	// What was refused ends in good order.
	for _, pod := range []*corev1.Pod{web[2], web[3]} {
		wentThrough(t, cluster.CoreV1().Pods(deny).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(1))}))
		wentThrough(t, cluster.AwaitGone(ctx, pod))
		d.went(pod, "ended")
	}
	return d, namespaces
}

// disruptions gives the pods with a label a budget that lets none of them go.
func disruptions(t *testing.T, ns, app string) {
	t.Helper()
	budgets := cluster.PolicyV1().PodDisruptionBudgets(ns)
	_, err := budgets.Create(t.Context(), &policyv1.PodDisruptionBudget{
		ObjectMeta: metav1.ObjectMeta{Name: app},
		Spec: policyv1.PodDisruptionBudgetSpec{
			MinAvailable: new(intstr.FromInt32(1)), Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}},
		},
	}, metav1.CreateOptions{})
	wentThrough(t, err)
	// Before that, evictions are refused for another reason, and repeated by the client.
	wentThrough(t, incident.Wait(t.Context(), 2*time.Minute, "the budget to count its pod", func(ctx context.Context) error {
		budget, err := budgets.Get(ctx, app, metav1.GetOptions{})
		if err != nil || budget.Status.CurrentHealthy == 1 {
			return err
		}
		return fmt.Errorf("it has counted %d", budget.Status.CurrentHealthy)
	}))
}

// review runs `eni-guard audit` on the API server's log, and returns what it printed and its exit status.
func review(t *testing.T, args ...string) (string, int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(repo, "bin/eni-guard"), append([]string{"audit", cluster.AuditLog()}, args...)...)
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if exit != nil && len(exit.Stderr) > 0 {
		t.Fatalf("eni-guard audit %s: %s", strings.Join(args, " "), exit.Stderr)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// The review of the API server's own log tells exactly what was done. The audit policy of the cluster is the one of docs/audit.md.
func TestTheReviewTellsWhatWasDone(t *testing.T) {
	began := time.Now()
	did, namespaces := removeInEveryWay(t)
	t.Logf("done:\n%s\nweakened:\n%s", strings.Join(did.rows, "\n"), strings.Join(did.weakened, "\n"))
	if *recordTo != "" {
		did.write(t, *recordTo)
	}
	only := []string{"--strict", "--since", began.UTC().Format(time.RFC3339Nano), "--namespace", strings.Join(namespaces, ",")}
	out, status := review(t, append(only, "-o", "json")...)
	if status != 0 {
		t.Errorf("it ended with %d", status)
	}
	var told struct {
		Removals []struct {
			Namespace, Pod, UID, User, Path, Decision, Outcome, Reason, Node string
			Then                                                             struct{ How string }
		}
		Changes []struct {
			User, Object, What string
			Weakens            bool
		}
		Untold map[string]int
	}
	if err := json.Unmarshal([]byte(out), &told); err != nil {
		t.Fatal(err)
	}
	var rows, weakened []string
	for _, r := range told.Removals {
		rows = append(rows, strings.TrimSpace(fmt.Sprintf("%s/%s %s %s %s %s %s %s", r.Namespace, r.Pod, r.User, r.Path, r.Decision, r.Outcome, r.Reason, r.Then.How)))
		// The API server refuses before anybody has read the pod.
		if missing := r.Node != incident.Node || r.UID == ""; missing != (r.Decision == "unanswered") {
			t.Errorf("node %q, UID %q of %s", r.Node, r.UID, rows[len(rows)-1])
		}
	}
	if !slices.Equal(rows, did.rows) {
		t.Errorf("the review tells:\n%s", strings.Join(rows, "\n"))
	}
	for _, c := range told.Changes {
		if c.Weakens {
			weakened = append(weakened, c.User+" "+c.Object+": "+c.What)
		}
	}
	if !slices.Equal(weakened, did.weakened) {
		t.Errorf("the review tells that the guard was weakened by:\n%s", strings.Join(weakened, "\n"))
	}
	for what, n := range told.Untold {
		if n != 0 {
			t.Errorf("%d %s are untold", n, what)
		}
	}
	if _, status := review(t, append(only, "--fail-on", "slipped-past")...); status != 1 {
		t.Errorf("with --fail-on slipped-past it ended with %d", status)
	}
	if out, status := review(t, "--check"); status != 0 || !strings.Contains(out, "The log has what a review needs.") {
		t.Errorf("--check ended with %d:\n%s", status, out)
	}
	page, _ := review(t, append(only, "-o", "html")...)
	if !strings.Contains(page, "the webhook configuration was deleted") {
		t.Errorf("the page does not tell what slipped past:\n%s", page)
	}
}

// write writes the log, without the roles that every API server makes for itself when it starts, and what was done.
func (d *deeds) write(t *testing.T, dir string) {
	t.Helper()
	log, err := os.ReadFile(cluster.AuditLog())
	wentThrough(t, err)
	var packed bytes.Buffer
	out, err := gzip.NewWriterLevel(&packed, gzip.BestCompression)
	wentThrough(t, err)
	for line := range bytes.Lines(log) {
		if !bytes.Contains(line, []byte(`"username":"system:apiserver"`)) {
			_, err = out.Write(line)
			wentThrough(t, err)
		}
	}
	wentThrough(t, out.Close())
	for name, content := range map[string][]byte{
		"every-way.log.gz": packed.Bytes(), "every-way.txt": []byte(strings.Join(d.rows, "\n") + "\n"), "weakened.txt": []byte(strings.Join(d.weakened, "\n") + "\n"),
	} {
		wentThrough(t, os.WriteFile(filepath.Join(dir, name), content, 0o644))
	}
}
