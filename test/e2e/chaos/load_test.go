package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/eni-guard/eni-guard/test/e2e/incident"
)

const (
	overrideAnnotation = "eni-guard.io/allow-force-delete"
	untilAnnotation    = "eni-guard.io/allow-force-delete-until"
	// callTimeout bounds one request: longer than the API server waits for the webhook.
	callTimeout = 30 * time.Second
	// frozenGroups starts the names of the groups of frozen processes; a PID follows.
	frozenGroups = "/sys/fs/cgroup/freezer/eni-guard-cluster/chaos-"
)

// kind is what becomes of a pod; weight is how often, of the sum of all.
type kind struct {
	name   string
	weight int
	change func(*corev1.Pod)
	// stick makes the pod unkillable, and returns how to let it go.
	stick func(ctx context.Context, r *run, pod *corev1.Pod) (release func(ctx context.Context) error, err error)
	// fuse says that its process reads a file that is never answered.
	fuse bool
	// young says that nobody waits for it to start.
	young bool
}

var kinds = []kind{
	{name: "plain", weight: 30},
	{name: "job", weight: 12, change: func(pod *corev1.Pod) {
		pod.Spec.RestartPolicy = corev1.RestartPolicyNever
		pod.Spec.Containers[0].Command = []string{"true"}
	}},
	{name: "hasty", weight: 5, change: func(pod *corev1.Pod) { pod.Spec.TerminationGracePeriodSeconds = new(int64(0)) }},
	{name: "young", weight: 5, young: true},
	{name: "stuck", weight: 20, fuse: true},
	{name: "frozen", weight: 14, stick: freeze},
	{name: "escaped", weight: 14, fuse: true, stick: escape},
}

func pick(random *rand.Rand) kind {
	sum := 0
	for _, k := range kinds {
		sum += k.weight
	}
	n := random.IntN(sum)
	for _, k := range kinds {
		if n -= k.weight; n < 0 {
			return k
		}
	}
	panic("weights do not add up")
}

// actor makes one pod after the other, until ctx ends, and has each removed in all the ways there are. What it has begun it
// brings to its end, with what is left of all.
func (r *run) actor(ctx, all context.Context, random *rand.Rand, namespace string, index int) {
	for i := 0; ctx.Err() == nil; i++ {
		k := pick(random)
		name := fmt.Sprintf("%s-%d-%d", k.name, index, i)
		if err := r.live(ctx, all, random, k, namespace, name); err != nil && all.Err() == nil {
			r.fail("pod %s/%s: %v", namespace, name, err)
		}
	}
}

// live is the life of one pod.
func (r *run) live(ctx, all context.Context, random *rand.Rand, k kind, namespace, name string) (err error) {
	pod := incident.Pod(namespace, name, []string{"sleep", "86400"}, k.change)
	release := func(context.Context) error { return nil }
	if k.fuse {
		stuck, err := r.cluster.StartStuckFS(all, namespace+"-"+name)
		if err != nil {
			return err
		}
		release = func(context.Context) error { return stuck.Release() }
		pod = stuck.StuckPod(namespace, name)
	}
	// Whatever happens, nothing may stay stuck when this ends.
	defer func() { err = errors.Join(err, release(context.WithoutCancel(all))) }()

	pod, err = r.create(ctx, pod)
	if err != nil || pod == nil {
		return err
	}
	r.count("pods", k.name)
	if !k.young {
		if pod, err = r.started(all, pod); err != nil || pod == nil {
			return err
		}
		if k.fuse && pod.DeletionTimestamp == nil {
			// One that a delete of its whole namespace has killed before is just another pod.
			if _, err := incident.AwaitStuck(all, pod, "S"); err == nil {
				r.count("stuck", "in a file system")
			}
		}
		if k.stick != nil {
			also, err := k.stick(all, r, pod)
			if err != nil {
				return err
			}
			mend := release
			release = func(ctx context.Context) error { return errors.Join(also(ctx), mend(ctx)) }
		}
	}
	if random.IntN(8) == 0 {
		if err := r.override(all, random, pod); err != nil {
			return err
		}
	}
	for range 1 + random.IntN(5) {
		pause(all, time.Duration(50+random.IntN(700))*time.Millisecond)
		r.try(all, r.intern, pickWay(random), pod)
		if gone, _ := r.gone(all, pod); gone {
			break
		}
	}
	return r.end(all, pod, release)
}

// end lets a pod go, and waits until it is gone. Only what is gone already, and has been looked at by then, may let go at
// once: otherwise a sandbox could end between a removal that is wrong and the look that would find it.
func (r *run) end(ctx context.Context, pod *corev1.Pod, release func(context.Context) error) error {
	err := incident.Wait(ctx, 4*time.Minute, "the observer to look at what is left of it", func(ctx context.Context) error {
		gone, err := r.gone(ctx, pod)
		if err == nil && gone && !r.observer.Judged(pod.UID) {
			err = errors.New("its object is gone, and the observer has not looked since")
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := release(ctx); err != nil {
		return err
	}
	return incident.Wait(ctx, 5*time.Minute, "it to be gone", func(ctx context.Context) error {
		now, err := r.cluster.CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			return nil
		case err != nil:
			return err
		case now.DeletionTimestamp == nil:
			return errors.Join(errors.New("it is not being deleted"), r.try(ctx, r.intern, ways[1], pod))
		}
		return fmt.Errorf("phase %s, finalizers %v", now.Status.Phase, now.Finalizers)
	})
}

// create makes a pod. It tries until that works, which it does not while the API server is away; nil if ctx ends first.
func (r *run) create(ctx context.Context, pod *corev1.Pod) (*corev1.Pod, error) {
	for ctx.Err() == nil {
		call, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTimeout)
		created, err := r.cluster.CoreV1().Pods(pod.Namespace).Create(call, pod, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			// The answer to the request before was lost.
			created, err = r.cluster.CoreV1().Pods(pod.Namespace).Get(call, pod.Name, metav1.GetOptions{})
		}
		cancel()
		if err == nil {
			r.observer.Expect(created)
			return created, nil
		}
		pause(ctx, 500*time.Millisecond)
	}
	return nil, nil
}

// started waits until a pod runs and has an address, or has run to its end; nil if it is gone before.
func (r *run) started(ctx context.Context, pod *corev1.Pod) (*corev1.Pod, error) {
	var gone bool
	var now *corev1.Pod
	err := incident.Wait(ctx, 4*time.Minute, "it to start", func(ctx context.Context) (err error) {
		now, err = r.cluster.CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			gone = true
			return nil
		}
		if err == nil && now.DeletionTimestamp == nil && (now.Status.Phase == corev1.PodPending || now.Status.Phase == corev1.PodRunning && now.Status.PodIP == "") {
			pause(ctx, 300*time.Millisecond)
			err = fmt.Errorf("phase %s, address %q", now.Status.Phase, now.Status.PodIP)
		}
		return err
	})
	if gone {
		return nil, nil
	}
	return now, err
}

// gone says whether a pod's object is gone.
func (r *run) gone(ctx context.Context, pod *corev1.Pod) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := r.cluster.CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	return false, err
}

// way is a way in.
type way struct {
	name string
	take func(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod) error
}

var atOnce = metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))}

var ways = []way{
	{"forced delete", func(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod) error {
		return api.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, atOnce)
	}},
	{"delete, one second", func(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod) error {
		return api.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(1))})
	}},
	{"plain delete", func(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod) error {
		return api.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{})
	}},
	{"forced eviction", func(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod) error {
		return evict(ctx, api, pod, &atOnce)
	}},
	{"plain eviction", func(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod) error {
		return evict(ctx, api, pod, nil)
	}},
	{"forced collection delete of one", func(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod) error {
		return api.CoreV1().Pods(pod.Namespace).DeleteCollection(ctx, atOnce, metav1.ListOptions{FieldSelector: "metadata.name=" + pod.Name})
	}},
	{"forced collection delete of a namespace", func(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod) error {
		return api.CoreV1().Pods(pod.Namespace).DeleteCollection(ctx, atOnce, metav1.ListOptions{})
	}},
}

// isWay says whether a count is one of a way in.
func isWay(what string) bool {
	return strings.HasPrefix(what, "override") || slices.ContainsFunc(ways, func(w way) bool { return w.name == what })
}

// pickWay picks any way, and only now and then the last one, which ends all pods of a namespace in mode hold.
func pickWay(random *rand.Rand) way {
	if random.IntN(40) == 0 {
		return ways[len(ways)-1]
	}
	return ways[random.IntN(len(ways)-1)]
}

func evict(ctx context.Context, api kubernetes.Interface, pod *corev1.Pod, options *metav1.DeleteOptions) error {
	return api.PolicyV1().Evictions(pod.Namespace).Evict(ctx, &policyv1.Eviction{
		ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name}, DeleteOptions: options,
	})
}

// try removes a pod in some way, and counts how that ends.
func (r *run) try(ctx context.Context, api kubernetes.Interface, w way, pod *corev1.Pod) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err := w.take(ctx, api, pod)
	r.count(w.name, outcome(err))
	return err
}

// outcome says in a few words how a request ended.
func outcome(err error) string {
	status := apierrors.APIStatus(nil)
	switch {
	case err == nil:
		return "done"
	case apierrors.IsNotFound(err):
		return "gone already"
	case strings.Contains(err.Error(), "denied the request"):
		return "refused by the guard"
	case strings.Contains(err.Error(), "failed calling webhook"):
		return "refused without the guard"
	case errors.As(err, &status):
		return fmt.Sprintf("answered %d", status.Status().Code)
	default:
		return "not answered"
	}
}

// override gives a pod an override, and has it removed by somebody who has the right; sometimes only after the override
// has ended, when it no longer counts.
func (r *run) override(ctx context.Context, random *rand.Rand, pod *corev1.Pod) error {
	annotations := fmt.Sprintf("%q:%q", overrideAnnotation, "a test")
	end := time.Now().Add(3 * time.Second).Truncate(time.Second)
	ends := random.IntN(2) == 0
	if ends {
		annotations += fmt.Sprintf(",%q:%q", untilAnnotation, end.UTC().Format(time.RFC3339))
	}
	call, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	_, err := r.operator.CoreV1().Pods(pod.Namespace).Patch(call, pod.Name, types.MergePatchType, []byte(`{"metadata":{"annotations":{`+annotations+`}}}`), metav1.PatchOptions{})
	if err != nil {
		// It is gone, or the API server is away.
		return nil
	}
	name := "override"
	if ends && random.IntN(2) == 0 {
		name = "override that has ended"
		pause(ctx, time.Until(end.Add(100*time.Millisecond)))
	}
	r.try(ctx, r.operator, way{name, ways[0].take}, pod)
	return nil
}

// freeze puts the process of a pod into a frozen group of its own, where it is in state D and SIGKILL has no effect.
func freeze(_ context.Context, r *run, pod *corev1.Pod) (func(context.Context) error, error) {
	pid := containerProcess(pod)
	if pid == 0 {
		return ended, nil
	}
	before, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if errors.Is(err, os.ErrNotExist) {
		return ended, nil
	}
	if err != nil {
		return nil, err
	}
	group := frozenGroups + strconv.Itoa(pid)
	if err := os.MkdirAll(group, 0o755); err != nil {
		return nil, err
	}
	write := func(file, text string) error { return os.WriteFile(filepath.Join(group, file), []byte(text), 0o600) }
	// It may have ended meanwhile.
	_ = write("cgroup.procs", strconv.Itoa(pid))
	if err := write("freezer.state", "FROZEN"); err != nil {
		return nil, err
	}
	r.count("stuck", "frozen")
	return func(ctx context.Context) error {
		if err := write("freezer.state", "THAWED"); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		// Back where it was, so that the group can be removed.
		for line := range strings.Lines(string(before)) {
			if _, path, found := strings.Cut(strings.TrimSpace(line), ":freezer:"); found {
				_ = os.WriteFile(filepath.Join("/sys/fs/cgroup/freezer", path, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o600)
			}
		}
		return incident.Wait(ctx, 2*time.Minute, "the frozen group to be empty", func(context.Context) error {
			if err := os.Remove(group); !errors.Is(err, os.ErrNotExist) {
				return err
			}
			return nil
		})
	}, nil
}

// escape takes the stuck process of a pod out of all cgroups of the pod.
func escape(_ context.Context, r *run, pod *corev1.Pod) (func(context.Context) error, error) {
	pid := containerProcess(pod)
	if pid == 0 {
		return ended, nil
	}
	groups, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	if err != nil {
		return nil, err
	}
	for _, file := range groups {
		// It may have ended meanwhile.
		_ = os.WriteFile(file, []byte(strconv.Itoa(pid)), 0o600)
	}
	r.count("stuck", "escaped")
	return ended, nil
}

// ended is how to let go of what has ended.
func ended(context.Context) error { return nil }

// containerProcess returns the PID of the process of a pod's container; 0 if there is none.
func containerProcess(pod *corev1.Pod) int {
	processes := incident.Processes(pod)
	i := slices.IndexFunc(processes, func(p incident.Process) bool { return p.Command == "sleep" || p.Command == "dd" })
	if i < 0 {
		return 0
	}
	return processes[i].PID
}
