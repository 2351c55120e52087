package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/eni-guard/eni-guard/internal/exitstatus"
	"github.com/eni-guard/eni-guard/internal/sandbox"
)

// The exit statuses of `eni-guard inspect`, beside 0: nothing is left, and exitstatus.Usage.
const (
	exitBound   = 1
	exitUnknown = 2
)

type inspectOptions struct {
	pod, uid, ip string
	all          bool
	output       string
	node         string
	criSocket    string
	kubeconfig   string
	timeout      time.Duration
}

// NewInspectCommand returns `eni-guard inspect`.
func NewInspectCommand() *cobra.Command {
	o := inspectOptions{}
	cmd := &cobra.Command{
		Use:   "inspect {--pod NAMESPACE/NAME | --uid UID | --ip ADDRESS | --all}",
		Short: "Tell, on a node, what of a pod is still there, or who has an address",
		Long: `Looks at the node it runs on, as root: at the container runtime, the cgroups of pods, all processes and all network
namespaces. It reads only.

Exit status: 0 nothing is left; 1 something is; 2 it could not look everywhere, and has found nothing, or could not print what it
has found; 64 wrong usage.`,
		Example: `  # who has this address?
  eni-guard inspect --ip 10.0.12.34
  # what is left here of pods that are gone, and which addresses are there twice?
  eni-guard inspect --all
  # the same through the agent of a node
  kubectl exec -n eni-guard AGENT-POD -- /eni-guard inspect --all`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return exitstatus.With(exitstatus.Usage, fmt.Errorf("%q is no flag%s", args[0], meant(args[0], "")))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			question, err := o.validate(cmd.Flags().Changed)
			if err != nil {
				return exitstatus.With(exitstatus.Usage, err)
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), o.timeout)
			defer cancel()
			return o.run(ctx, cmd.OutOrStdout(), question)
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return exitstatus.With(exitstatus.Usage, err) })
	flags := cmd.Flags()
	flags.Var((*once)(&o.pod), "pod", "NAMESPACE/NAME of a pod that the container runtime still knows")
	flags.Var((*once)(&o.uid), "uid", "UID of a pod, which need not exist any more")
	flags.Var((*once)(&o.ip), "ip", "address, IPv4 or IPv6")
	flags.BoolVar(&o.all, "all", false, "all that is left of pods that are gone, and all addresses that are there twice")
	flags.StringVarP(&o.output, "output", "o", "text", "text, or json for programs")
	flags.StringVar(&o.node, "node-name", nodeName(), "the name of this node in Kubernetes (or the environment variable NODE_NAME; otherwise that of the host)")
	flags.StringVar(&o.criSocket, "cri-socket", defaultCRISocket(), criSocketUsage)
	flags.StringVar(&o.kubeconfig, "kubeconfig", "", "for --all: how to reach the API server, such as /etc/kubernetes/kubelet.conf on many nodes; not needed in the agent's pod")
	flags.DurationVar(&o.timeout, "timeout", defaultTimeout, "how long to look, up to "+maxTimeout.String()+"; --all looks twice, a second apart")
	return cmd
}

// once is a flag that asks one question: of two, one would be dropped. It implements pflag.Value.
type once string

func (o *once) Set(value string) error {
	if *o != "" {
		return fmt.Errorf("it is given twice, after %q: ask one question at a time", string(*o))
	}
	*o = once(value)
	return nil
}

func (o *once) String() string { return string(*o) }

func (*once) Type() string { return "string" }

const criSocketUsage = "the container runtime's CRI socket (or the environment variable CRI_SOCKET)"

// checkCRISocket refuses what cannot be a socket. The prefix that crictl and the kubelet have is fine.
func checkCRISocket(socket string) error {
	if !filepath.IsAbs(strings.TrimPrefix(socket, "unix://")) {
		return fmt.Errorf("--cri-socket %q is not the absolute path of a socket", socket)
	}
	return nil
}

// likelyCRISockets are where common runtimes have their sockets.
var likelyCRISockets = []string{
	"/run/containerd/containerd.sock", "/run/crio/crio.sock", "/run/k3s/containerd/containerd.sock", "/run/k0s/containerd.sock", "/run/cri-dockerd.sock",
}

// nextStep says what to do about failures, if the container runtime is what fails and that can be told.
func nextStep(ctx context.Context, socket string, failures []string) string {
	// Also when the time for looking is over.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	conn, listener, err := dialSocket(ctx, socket)
	if err != nil {
		return afterDialing(socket, err, existing(likelyCRISockets))
	}
	_ = conn.Close()
	if !slices.ContainsFunc(failures, runtimeIsSilent) {
		all := strings.Join(failures, "; ")
		switch {
		case strings.Contains(all, coveredNamespace):
			return afterUncovering
		case strings.Contains(all, notFollowing):
			return afterUnmounting
		}
		return ""
	}
	name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", listener))
	return fmt.Sprintf("%s, and at what process %d (%s), which listens at %s, waits for (`cat /proc/%d/task/*/stack`)",
		silentRuntime, listener, strings.TrimSpace(string(name)), socket, listener)
}

const (
	afterUncovering = "look at what covers it with `findmnt` on the node, and unmount that if it is not meant to be there; an agent that started under it " +
		"sees the namespace when its pod has been started anew"
	afterUnmounting = "delete the agent's pod, so that the next one is given " + netnsDir + " as it is now; if that has the same, the pod is not as the chart makes it"
)

const silentRuntime = "the runtime does not answer; it can be started again while pods run. Before that, look at its log"

// runtimeIsSilent says whether a failure is that the runtime has not answered in time.
func runtimeIsSilent(failure string) bool {
	return strings.Contains(failure, noRuntimeAnswer) || strings.HasPrefix(failure, fmt.Sprintf("the probe %q did not run: no answer after ", sandbox.ProbeRuntime))
}

// afterDialing says what to do about err, with which the CRI socket could not be dialled, if anything; others are sockets that are there.
func afterDialing(socket string, err error, others []string) string {
	others = slices.DeleteFunc(others, func(other string) bool { return other == strings.TrimPrefix(socket, "unix://") })
	elsewhere, start := "name the socket of the container runtime by --cri-socket", ", or start the runtime"
	if len(others) > 0 {
		elsewhere, start = elsewhere+": this host has "+strings.Join(others, " and "), ""
	}
	switch {
	case errors.Is(err, fs.ErrPermission):
		return "run it as root: " + socket + " belongs to root"
	case errors.Is(err, fs.ErrNotExist):
		return "there is no " + socket + "; " + elsewhere + start
	case errors.Is(err, syscall.ECONNREFUSED):
		return "no container runtime listens at " + socket + "; start it, or " + elsewhere
	// EAGAIN: as many as the socket holds wait to be let in (unix(7)).
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return silentRuntime
	default:
		return ""
	}
}

// defaultCRISocket is that of containerd, unless the environment says otherwise: in the agent's pod it does, so that a command
// that is run there asks the right one.
func defaultCRISocket() string {
	if socket := os.Getenv("CRI_SOCKET"); socket != "" {
		return socket
	}
	return "/run/containerd/containerd.sock"
}

// nodeName is the name that a node mostly has (kubelet: pkg/util/node.GetHostname).
func nodeName() string {
	if name := os.Getenv("NODE_NAME"); name != "" {
		return name
	}
	name, _ := os.Hostname()
	return strings.ToLower(strings.TrimSpace(name))
}

// inspectQuestion is what a person wants to know, read.
type inspectQuestion struct {
	pod sandbox.Pod // by name or by UID
	ip  netip.Addr
}

// validate reads the question; given says whether a flag was, if only with an empty value.
func (o inspectOptions) validate(given func(flag string) bool) (inspectQuestion, error) {
	var q inspectQuestion
	if o.output != "text" && o.output != "json" {
		return q, fmt.Errorf("--output %q is neither text nor json", o.output)
	}
	if err := checkCRISocket(o.criSocket); err != nil {
		return q, err
	}
	if o.node == "" {
		return q, errors.New("--node-name is empty")
	}
	if o.timeout <= 0 || o.timeout > maxTimeout {
		return q, fmt.Errorf("--timeout %s is not above 0 and up to %s", o.timeout, maxTimeout)
	}
	asked := 0
	for _, question := range []struct{ flag, value string }{{"pod", o.pod}, {"uid", o.uid}, {"ip", o.ip}} {
		if !given(question.flag) {
			continue
		}
		if asked++; question.value == "" {
			return q, fmt.Errorf("--%s is empty", question.flag)
		}
	}
	if o.all {
		asked++
	}
	switch {
	case asked != 1:
		return q, errors.New("name one of --pod, --uid, --ip and --all, and what to look for")
	case o.pod != "":
		var found bool
		q.pod.Namespace, q.pod.Name, found = strings.Cut(o.pod, "/")
		if !found || len(validation.IsDNS1123Label(q.pod.Namespace))+len(validation.IsDNS1123Subdomain(q.pod.Name)) > 0 {
			return q, fmt.Errorf("--pod %q is not NAMESPACE/NAME%s", o.pod, meant(o.pod, "--pod"))
		}
	case o.uid != "":
		q.pod.UID = o.uid
		// One that is cut off would be found nowhere, and nothing would seem to be left.
		if !fullUID(o.uid) {
			return q, fmt.Errorf("--uid %q is not the UID of a pod, in full: `kubectl get pod -o yaml` and the guard's messages have it%s", o.uid, meant(o.uid, "--uid"))
		}
	case o.ip != "":
		return q, q.setAddress(o.ip)
	}
	return q, nil
}

func (q *inspectQuestion) setAddress(text string) error {
	ip, err := netip.ParseAddr(text)
	switch {
	case err != nil:
		return fmt.Errorf("--ip %q is not an address%s", text, meant(text, "--ip"))
	case ip.Zone() != "":
		return fmt.Errorf("--ip %q has a zone: addresses are looked for on all interfaces, so name it without %q", text, "%"+ip.Zone())
	case ip.Unmap().IsLoopback(), ip.Unmap().IsLinkLocalUnicast(), ip.IsUnspecified(), ip.IsMulticast():
		return fmt.Errorf("--ip %s is no address that one pod alone can have (loopback, link-local, multicast, unspecified), so it is not looked for", text)
	}
	q.ip = ip.Unmap()
	return nil
}

func fullUID(text string) bool {
	uid, ok := podOfCgroup("pod" + text)
	return ok && uid == text
}

// meant is a question about the flag and the value that a value looks made for, if those are not the ones that were given.
func meant(value, given string) string {
	flag, better := "", strings.TrimSpace(value)
	address, notAddress := netip.ParseAddr(better)
	network, notNetwork := netip.ParsePrefix(better)
	port, notPort := netip.ParseAddrPort(better)
	uid, ofCgroup := podOfCgroup(filepath.Base(better))
	namespace, name, cut := strings.Cut(better, "/")
	_, noHost := netip.ParseAddr(namespace)
	switch {
	case notAddress == nil:
		flag, better = "--ip", address.String()
	case notNetwork == nil:
		flag, better = "--ip", network.Addr().String()
	case notPort == nil:
		flag, better = "--ip", port.Addr().String()
	case cut && noHost == nil: // with the length of a prefix that it cannot have
		flag, better = "--ip", namespace
	case fullUID(strings.ToLower(better)):
		flag, better = "--uid", strings.ToLower(better)
	case ofCgroup:
		flag, better = "--uid", uid
	case cut && slices.Contains([]string{"pod", "pods", "po"}, namespace): // as kubectl names them
		flag, better = "--pod", "NAMESPACE/"+name
	case cut && namespace != "" && name != "" && !strings.Contains(name, "/"):
		flag = "--pod"
	}
	if flag == "" || flag == given && better == value {
		return ""
	}
	return fmt.Sprintf("; did you mean %s %s?", flag, better)
}

// answer is what `eni-guard inspect` found; with -o json it is what is printed.
type answer struct {
	Node    string          `json:"node"`
	Verdict sandbox.Verdict `json:"verdict"`
	// Named is the NAMESPACE/NAME that --pod has asked about.
	Named string `json:"named,omitempty"`
	// Reports answer --pod and --uid.
	Reports []sandbox.Report `json:"reports,omitempty"`
	// Pods are those of Reports, by UID.
	Pods map[string]sandbox.Pod `json:"pods,omitempty"`
	// Holders answer --ip.
	IP      netip.Addr `json:"ip,omitzero"`
	Holders []Trace    `json:"holders,omitempty"`
	Routes  []string   `json:"routes,omitempty"`
	// Conflict says that the address was given to a pod, and several have it.
	Conflict bool `json:"conflict,omitempty"`
	// Probes are those that have looked for Holders; reports have their own.
	Probes []sandbox.Probe `json:"probes,omitempty"`
	// Leftovers and Shared answer --all.
	All       bool            `json:"all,omitempty"`
	Leftovers []Trace         `json:"leftovers,omitempty"`
	Shared    []SharedAddress `json:"sharedAddresses,omitempty"`
	// ComparedBy says by which kubeconfig, or account, the API server was asked for the pods of the node, and NotCompared why leftovers were not
	// compared with them.
	ComparedBy  string `json:"comparedBy,omitempty"`
	NotCompared string `json:"notCompared,omitempty"`
	// Failures say what could not be looked at, and NextStep what may help.
	Failures []string `json:"failures,omitempty"`
	NextStep string   `json:"nextStep,omitempty"`
}

func (o inspectOptions) run(ctx context.Context, out io.Writer, q inspectQuestion) error {
	runtime, err := NewRuntime(o.criSocket)
	if err != nil {
		return exitstatus.With(exitstatus.Usage, fmt.Errorf("--cri-socket: %w", err))
	}
	defer runtime.Close()
	inspector := NewInspector(o.node, realNode, runtime)
	var a answer
	switch {
	case q.ip.IsValid():
		a = inspector.holdersOf(ctx, q.ip)
	case o.all:
		a = inspector.everything(ctx, o.known)
	case q.pod.UID != "":
		a = inspector.reports(ctx, []sandbox.Pod{q.pod})
	default:
		a = inspector.byName(ctx, q.pod)
	}
	a.Node = o.node
	if a.NextStep == "" && len(a.Failures) > 0 {
		a.NextStep = nextStep(ctx, o.criSocket, a.Failures)
	}
	if err := a.print(out, o.output); err != nil {
		return exitstatus.With(exitUnknown, err) // 1 would say that something is left
	}
	switch a.Verdict {
	case sandbox.Released:
		return nil
	case sandbox.Bound:
		return exitstatus.Error(exitBound)
	default:
		return exitstatus.Error(exitUnknown)
	}
}

// known asks the API server for the pods of the node, and says by which way.
func (o inspectOptions) known(ctx context.Context) (map[string]bool, string, error) {
	config, from, err := apiConfig(o.kubeconfig)
	if err != nil {
		return nil, from, err
	}
	pods, err := newNodePods(config, o.node)
	if err != nil {
		return nil, from, err
	}
	known, err := pods.live(ctx)
	if err == nil && len(known) == 0 {
		err = pods.nodeExists(ctx)
	}
	return known, from, err
}

// reports answers for pods by UID.
func (i *Inspector) reports(ctx context.Context, pods []sandbox.Pod) answer {
	a := answer{Verdict: sandbox.Released, Pods: map[string]sandbox.Pod{}}
	for _, pod := range pods {
		report := i.look(ctx, sandbox.Query{Node: i.node, UID: pod.UID}, thorough)
		a.Reports = append(a.Reports, report)
		a.Pods[pod.UID] = pod
		a.Verdict = worse(a.Verdict, report.Verdict())
		for _, failure := range report.Failures() {
			if !slices.Contains(a.Failures, failure) {
				a.Failures = append(a.Failures, failure)
			}
		}
	}
	if a.Verdict != sandbox.Released {
		return a
	}
	// Without its record and its processes nothing leads from a pod to its namespace, unless somebody knows the address.
	s := i.surveyInTime(ctx)
	for n := range s.probes {
		if s.probes[n].Name == sandbox.ProbeNetns {
			why := append(nobodys(s.traces()), s.probes[n].Error)
			s.probes[n].Error = strings.Join(slices.DeleteFunc(why, func(text string) bool { return text == "" }), "; ")
		}
	}
	if a.Failures = s.failures(); len(a.Failures) > 0 {
		a.Verdict = sandbox.Unknown
		for n := range a.Reports {
			a.Reports[n].Probes = s.probes
		}
	}
	return a
}

// nobodys says which of the traces are of namespaces that are nobody's, but could be what is left of a pod.
func nobodys(traces []Trace) []string {
	var found []string
	for _, t := range traces {
		if t.Pod.UID == "" && (t.madeByARuntime || t.unmounted && len(t.addresses) > 0) {
			found = append(found, fmt.Sprintf("network namespace %s is nobody's, and may be what is left of the pod: ask with --ip and its address", t.Findings[0].Netns))
		}
	}
	return found
}

// surveyInTime looks at the whole node, and leaves half of the time: a runtime that hangs must not keep what was found from being
// described.
func (i *Inspector) surveyInTime(ctx context.Context) survey {
	first, cancel := part(ctx, 1, 2)
	defer cancel()
	return i.survey(first)
}

// worse is the verdict about two things together.
func worse(a, b sandbox.Verdict) sandbox.Verdict {
	switch {
	case a == sandbox.Bound || b == sandbox.Bound:
		return sandbox.Bound
	case a == sandbox.Released && b == sandbox.Released:
		return sandbox.Released
	default:
		return sandbox.Unknown
	}
}

// byName answers for all pods of a name that the runtime knows. Where it knows none, that says nothing: what has lost its record
// cannot be found by name.
func (i *Inspector) byName(ctx context.Context, name sandbox.Pod) answer {
	listing, cancel := part(ctx, 1, 2) // a runtime that hangs must leave time to look for the pods that it has told of
	defer cancel()
	records, err := i.runtime.all(listing)
	var pods []sandbox.Pod
	for _, s := range records.sandboxes {
		if s.pod.Namespace == name.Namespace && s.pod.Name == name.Name && !slices.Contains(pods, s.pod) {
			pods = append(pods, s.pod)
		}
	}
	a := answer{Verdict: sandbox.Unknown}
	if err == nil || len(pods) > 0 {
		a = i.reports(ctx, pods)
	}
	a.Named = name.Namespace + "/" + name.Name
	if err != nil {
		a.Failures = append(a.Failures, fmt.Sprintf("the runtime's sandboxes could not be listed (%s), so there may be other pods of this name; --uid, --ip and --all look without it", text(err)))
		a.Verdict = worse(a.Verdict, sandbox.Unknown)
	}
	if len(pods) == 0 && err == nil {
		a.Failures = append(a.Failures, fmt.Sprintf("the runtime has no sandbox of a pod %s; what has lost its record is found by --uid, --ip or --all", a.Named))
		a.Verdict = sandbox.Unknown
	}
	return a
}

// holdersOf answers who has an address.
func (i *Inspector) holdersOf(ctx context.Context, ip netip.Addr) answer {
	s := i.surveyInTime(ctx)
	a := answer{IP: ip, Verdict: sandbox.Released, Failures: s.failures(), Probes: s.probes}
	for _, t := range s.traces() {
		if slices.Contains(t.addresses, ip) {
			a.Verdict = sandbox.Bound
			a.Holders = append(a.Holders, i.told(ctx, s, t, &a))
		}
	}
	own, err := run(ctx, i.slots[sandbox.ProbeNetns], func(context.Context) ([]assignment, error) { return i.host.ownAddress(ip) })
	a.missed(err)
	for _, address := range own {
		a.Verdict = sandbox.Bound
		a.Holders = append(a.Holders, Trace{Findings: []sandbox.Finding{{Kind: sandbox.IPAssigned, IP: ip, Interface: address.device, Netns: s.view.host + ", the host's own"}}})
	}
	paths, err := run(ctx, i.slots[sandbox.ProbeNetns], func(context.Context) (hostPaths, error) { return i.host.paths([]netip.Addr{ip}) })
	a.missed(err)
	for _, r := range paths.routes {
		a.Routes = append(a.Routes, r.String())
		// Who could not look into every namespace does not know that none has the address.
		if r.peer && len(a.Holders) == 0 && len(a.Failures) == 0 {
			a.Verdict = sandbox.Bound
			a.Holders = append(a.Holders, Trace{Findings: []sandbox.Finding{{Kind: sandbox.PeerOpen, IP: ip, Interface: r.device}}})
		}
	}
	a.Routes = append(a.Routes, paths.rules...)
	a.Conflict = conflict(a.Holders, ip)
	if a.Verdict == sandbox.Released && len(a.Failures) > 0 {
		a.Verdict = sandbox.Unknown
	}
	return a
}

// confirmAfter is the pause between the two looks that a leftover must be seen in: what is being made or taken down is not.
const confirmAfter = time.Second

const stillChanging = "what is left went on changing from one look to the next, a second later: ask again, or give it more time with --timeout"

// glance is what one look at all of the node has found of what is left, or there twice.
type glance struct {
	survey
	left   []Trace
	shared []SharedAddress
	// comparedBy and notCompared are as in answer.
	comparedBy, notCompared string
	// elsewhere says that whoever was asked about pods knows none of those that are here.
	elsewhere bool
}

// failed says what it could not see.
func (g glance) failed() []string {
	failures := g.failures()
	if g.notCompared != "" {
		failures = append(failures, "the pods of the API server: "+g.notCompared)
	}
	return failures
}

// in returns what both have found.
func (g glance) in(before glance) (left []Trace, shared []SharedAddress) {
	left = slices.DeleteFunc(slices.Clone(g.left), func(t Trace) bool { return !slices.ContainsFunc(before.left, t.same) })
	shared = slices.DeleteFunc(slices.Clone(g.shared), func(s SharedAddress) bool {
		return !slices.ContainsFunc(before.shared, func(b SharedAddress) bool { return b.IP == s.IP })
	})
	return left, shared
}

// glance looks once. It leaves a quarter of the time: neither a runtime nor an API server that hangs may hide what is left.
func (i *Inspector) glance(ctx context.Context, pods func(context.Context) (known map[string]bool, from string, err error)) glance {
	g := glance{survey: i.surveyInTime(ctx)}
	traces := g.traces()
	asking, cancel := part(ctx, 1, 2)
	defer cancel()
	known, from, err := pods(asking)
	g.comparedBy, g.notCompared, g.shared = from, text(err), sharedAddresses(traces)
	if err != nil {
		g.left = leftovers(traces, g.runtimeAnswered(), nil)
		return g
	}
	g.left = leftovers(traces, g.runtimeAnswered(), func(uid string) bool { return known[uid] })
	g.elsewhere = len(g.records.sandboxes) > 0 && !slices.ContainsFunc(g.records.sandboxes, func(r podSandbox) bool { return known[r.pod.UID] })
	return g
}

// everything answers what is left on the node of pods that are gone, and which addresses are there twice: what two looks have found, one after the
// other. Where the second has found more, it looks again, if ctx has a deadline and while that is far enough away.
func (i *Inspector) everything(ctx context.Context, pods func(context.Context) (known map[string]bool, from string, err error)) answer {
	var found []Trace
	var shared []SharedAddress
	var stopped []string // why what is unconfirmed was not seen again
	last := i.glance(ctx, pods)
	unconfirmed := len(last.left) + len(last.shared)
	deadline, limited := ctx.Deadline()
	// After the pause as much is left for a further look, and for telling what was found.
	for second := true; unconfirmed > 0 && (second || time.Until(deadline) > 2*confirmAfter); second = false {
		if limited && time.Until(deadline) < confirmAfter+confirmAfter/10 {
			stopped = []string{"there was no time for a second look, a second later: give it more with --timeout"}
			break
		}
		select {
		case <-time.After(confirmAfter):
		case <-ctx.Done():
		}
		next := i.glance(ctx, pods)
		if !second && len(next.failed()) > len(last.failed()) {
			stopped = append([]string{"a further look failed"}, next.failed()...) // it would hide what is confirmed
			break
		}
		found, shared = next.in(last)
		unconfirmed = len(next.left) - len(found) + len(next.shared) - len(shared)
		last = next
	}
	a := answer{All: true, ComparedBy: last.comparedBy, NotCompared: last.notCompared, Failures: last.failures()}
	// On the right node this is rare: most have a DaemonSet's pod.
	if last.elsewhere && slices.ContainsFunc(found, func(t Trace) bool { return t.Leftover == leftoverOfGonePod }) {
		a.NextStep = fmt.Sprintf("before anything else, make sure that this is node %s (--node-name), of the cluster that was asked (--kubeconfig): "+
			"of all pods that the runtime knows, the API server has none there", i.node)
	}
	switch {
	case len(stopped) > 0:
		are := "are"
		if unconfirmed == 1 {
			are = "is"
		}
		a.Failures = append(a.Failures, fmt.Sprintf("of what was seen, %d %s not confirmed: %s", unconfirmed, are, strings.Join(stopped, "; ")))
	case unconfirmed > 0:
		a.Failures = append(a.Failures, stillChanging)
	}
	for _, t := range found {
		a.Leftovers = append(a.Leftovers, i.told(ctx, last.survey, t, &a))
	}
	for _, address := range shared {
		for n, t := range address.Holders {
			address.Holders[n] = i.told(ctx, last.survey, t, &a)
		}
		a.Shared = append(a.Shared, address)
	}
	switch {
	case len(a.Leftovers)+len(a.Shared) > 0:
		a.Verdict = sandbox.Bound
	case len(a.Failures) > 0 || a.NotCompared != "":
		a.Verdict = sandbox.Unknown
	default:
		a.Verdict = sandbox.Released
	}
	return a
}

// same says whether another trace is of the same thing.
func (t Trace) same(other Trace) bool { return t.key == other.key }

// told is a trace as it is printed; what could not be read of it is a failure of the answer.
func (i *Inspector) told(ctx context.Context, s survey, t Trace, a *answer) Trace {
	described, err := i.described(ctx, s, t)
	a.missed(err)
	return described
}

// missed adds what could not be looked at, unless a probe has said the same.
func (a *answer) missed(err error) {
	if err != nil && !slices.ContainsFunc(a.Failures, func(f string) bool { return strings.Contains(f, text(err)) }) {
		a.Failures = append(a.Failures, text(err))
	}
}

// print writes the answer for people or for programs.
func (a answer) print(out io.Writer, format string) error {
	if format == "json" {
		encoder := json.NewEncoder(out)
		encoder.SetIndent("", "  ")
		return encoder.Encode(a)
	}
	_, err := io.WriteString(out, a.text(time.Now()))
	return err
}
