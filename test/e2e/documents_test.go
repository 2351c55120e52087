package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

// notRun are the commands of the documents that the tests do not run as they are, and why.
var notRun = map[string]string{
	"make demo":         "installs the guard anew, with the cluster, which these tests use",
	"make test":         "runs these tests",
	"make cluster-down": "destroys the cluster",
	"kubectl logs -n kube-system kube-apiserver-NODE | eni-guard audit": "the API server of this cluster is no pod",
	// All replicas end, and the certificates are lost.
	"kubectl scale -n eni-guard deployment/eni-guard-webhook --replicas=0":                                           byCertificates,
	"kubectl wait -n eni-guard --for=delete --timeout=2m pod -l app.kubernetes.io/component=webhook":                 byCertificates,
	"kubectl delete secret -n eni-guard eni-guard-ca eni-guard-webhook-tls eni-guard-client-tls eni-guard-agent-tls": byCertificates,
	"kubectl scale -n eni-guard deployment/eni-guard-webhook --replicas=2":                                           byCertificates,
	"kubectl rollout restart -n eni-guard daemonset/eni-guard-agent":                                                 byCertificates,
	// The guard is gone.
	"kubectl delete validatingwebhookconfiguration eni-guard eni-guard-failing-open": byUninstall,
	"go run . webhook free-held --cluster-role-binding=eni-guard-agent":              byUninstall,
	"helm uninstall eni-guard -n eni-guard --no-hooks":                               byUninstall,
	"kubectl delete job -n eni-guard eni-guard-free-held --ignore-not-found":         byUninstall,
}

const (
	byCertificates = "TestTwoReplicasThatStartAtOnceMakeOneAuthority runs it, because it must be alone"
	byUninstall    = "TestUninstallByHand runs it, because it must be alone"
)

// stepsRunElsewhere returns the block of commands that the caller runs, and fails unless it has all that are left to it.
func stepsRunElsewhere(t *testing.T, caller string) []string {
	t.Helper()
	var steps []string
	for _, b := range blocks(t) {
		if notRun[b.commands[0]] == caller {
			steps = b.commands
		}
	}
	for command, why := range notRun {
		if why == caller && !slices.Contains(steps, command) {
			t.Errorf("%q is run by nobody", command)
		}
	}
	return steps
}

// adapted are what is added to commands that would otherwise change what all tests share; by how they begin.
var adapted = map[string]string{"helm install ": " --dry-run=server"}

// ending are the statuses with which commands may end, by a part of them; all others must end with 0.
var ending = map[string][]int{
	"inspect --ip ": {1},       // the address is in use, by the pod of this test
	"inspect --all": {0, 1, 2}, // other tests may have left something, and make and end pods while it looks
	"--grace-period=0 --force --dry-run=server": {1}, // it asks, and the guard answers that the pod is bound
}

// block is a block of commands, as somebody would paste it.
type block struct {
	document string
	commands []string
}

var fenced = regexp.MustCompile("(?ms)^( *)```(?:console|sh|bash|shell)\n(.*?)^ *```$")

// blocks returns the blocks of commands of the documents that people are to use. A command may have several lines.
func blocks(t *testing.T) []block {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(repo, "docs/*.md"))
	wentThrough(t, err)
	var all []block
	for _, file := range append(files, filepath.Join(repo, "README.md"), filepath.Join(repo, "README.zh-CN.md")) {
		content, err := os.ReadFile(file)
		wentThrough(t, err)
		for _, match := range fenced.FindAllStringSubmatch(string(content), -1) {
			b := block{document: strings.TrimSuffix(filepath.Base(file), ".md")}
			text := strings.ReplaceAll(match[2], "\\\n", "")
			for line := range strings.Lines(text) {
				command := strings.Join(strings.Fields(line), " ")
				if command != "" && !strings.HasPrefix(command, "#") {
					b.commands = append(b.commands, command)
				}
			}
			all = append(all, b)
		}
	}
	return all
}

// What the documents tell people to type works, on this cluster, with what stands for something of theirs filled in.
func TestTheCommandsOfTheDocuments(t *testing.T) {
	t.Parallel()
	all := blocks(t)
	seen, done := map[string]bool{}, map[string]bool{}
	for _, b := range all {
		var run []string
		for _, command := range b.commands {
			seen[command] = true
			if _, is := notRun[command]; !is {
				run = append(run, command)
			}
		}
		// Both READMEs show the same.
		if script := strings.Join(run, "\n"); script != "" && !done[script] {
			done[script] = true
			t.Run(fmt.Sprintf("%s %d", b.document, len(done)), func(t *testing.T) { typeIn(t, run) })
		}
	}
	if len(done) < 8 {
		t.Errorf("only %d blocks of commands were found", len(done))
	}
	for _, command := range slices.Sorted(maps.Keys(notRun)) {
		if seen[command] {
			t.Logf("not run: %s: %s", command, notRun[command])
		} else {
			t.Errorf("no document has %q any more", command)
		}
	}
}

// stands matches what stands for something of the reader's.
var stands = regexp.MustCompile(`\b[A-Z]{2,}\b`)

// typeIn runs commands in one shell, as the administrator, at the top of the checkout.
func typeIn(t *testing.T, commands []string) {
	t.Helper()
	t.Logf("run:\n%s", strings.Join(commands, "\n"))
	ns := moded(t, "deny")
	pod := sleeper(t, ns, "web-0", nil)
	if slices.ContainsFunc(commands, func(c string) bool { return strings.Contains(c, "$deleteFromPrimitiveList") }) {
		setMode(t, ns, "hold")
		pod, _ = heldStuckPod(t, stuckFS(t, ns), ns, "payment-0")
		kubectl(t, ns, "annotate", "pod", pod.Name, "eni-guard.io/allow-force-delete=a test of the documents")
	}
	if slices.ContainsFunc(commands, func(c string) bool { return strings.HasPrefix(c, "kubectl drain ") }) {
		// Its pods have the label app, by its name, and a controller, without which they are not drained.
		kubectl(t, ns, "create", "deployment", ns, "--image="+incident.BusyboxImage, "--", "sleep", "86400")
		kubectl(t, ns, "wait", "deployment/"+ns, "--for=condition=Available", "--timeout=2m")
	}
	dir := t.TempDir()
	fill := strings.NewReplacer(
		"'/var/log/kubernetes/audit*.log*'", "'"+cluster.AuditLog()+"*'",
		"/var/log/kubernetes/audit.log", cluster.AuditLog(),
		"audit.log", cluster.AuditLog(),
		"review.html", filepath.Join(dir, "review.html"),
		"REGISTRY", "eni-guard.io", "TAG", imageTag(t),
		"AGENT-POD", "daemonset/eni-guard-agent",
		"10.0.12.34", pod.Status.PodIP, "ADDRESS", pod.Status.PodIP,
		"NAMESPACE", ns, "app=SOME", "app="+ns, "POD", pod.Name, "NODE", incident.Node,
	)
	var script strings.Builder
	for _, command := range commands {
		for start, more := range adapted {
			if strings.HasPrefix(command, start) {
				command += more
			}
		}
		want := []int{0}
		for part, statuses := range ending {
			if strings.Contains(command, part) {
				want = statuses
			}
		}
		command = fill.Replace(command)
		// A variable of the shell, such as $AGENT, is none.
		for _, word := range stands.FindAllString(command, -1) {
			if !strings.Contains(command, "$"+word) && !strings.Contains(command, word+"=$") {
				t.Errorf("nothing says what %s stands for in %q", word, command)
			}
		}
		fmt.Fprintf(&script, "%s\nstatus=$?; case $status in %s) ;; *) echo \"the last command ended with $status\" >&2; exit 99;; esac\n",
			command, strings.Trim(strings.ReplaceAll(fmt.Sprint(want), " ", "|"), "[]"))
	}
	if out, err := shell(t.Context(), ns, dir, script.String()); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

// shell runs a script as somebody who has kubectl, Helm and eni-guard installed, a namespace as the current one, and an image of the
// guard in a registry.
func shell(ctx context.Context, ns, dir, script string) (string, error) {
	kubeconfig := filepath.Join(dir, "kubeconfig")
	content, err := os.ReadFile(cluster.Kubeconfig())
	if err = errors.Join(err, os.WriteFile(kubeconfig, content, 0o600)); err != nil {
		return "", err
	}
	binaries, err := filepath.Abs(filepath.Join(repo, "bin"))
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, "bash", "-c", "kubectl config set-context --current --namespace="+ns+" >/dev/null || exit\nset -v\n"+script)
	cmd.Dir = repo
	cmd.Env = append(os.Environ(), "KUBECONFIG="+kubeconfig, "CRI_SOCKET=/run/eni-guard-cluster/containerd.sock",
		"PATH="+filepath.Dir(cluster.Binary("kubectl"))+":"+binaries+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	return string(out), err
}
