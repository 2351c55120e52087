package incident

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Story replays the incident and fails at the first thing that is not as told.
type Story struct {
	*Cluster
	// Tell says one step in plain words.
	Tell func(format string, args ...any)
	// Show prints what a command printed; without a command, something that was looked up.
	Show func(command, output string)
}

// kubectl runs kubectl in a namespace and shows it.
func (s *Story) kubectl(ctx context.Context, namespace string, args ...string) (string, error) {
	args = append([]string{"-n", namespace}, args...)
	out, err := s.Kubectl(ctx, args...)
	s.Show("kubectl "+strings.Join(args, " "), out)
	return out, err
}

// forceDelete is the command of the incident.
func (s *Story) forceDelete(ctx context.Context, namespace, name string) (string, error) {
	return s.kubectl(ctx, namespace, "delete", "pod", name, "--grace-period=0", "--force")
}

// stuckPod starts a pod, deletes it gracefully and waits until its process is in state D.
func (s *Story) stuckPod(ctx context.Context, stuck *StuckFS, namespace, name string) (*corev1.Pod, Process, error) {
	pod, err := s.Start(ctx, stuck.StuckPod(namespace, name))
	if err != nil {
		return nil, Process{}, err
	}
	process, err := AwaitStuck(ctx, pod, "S")
	if err != nil {
		return nil, Process{}, err
	}
	s.Tell("Pod %s runs with address %s. Its process %d (%s) has run into a kernel bug: it waits in %s for an answer that never comes.",
		name, pod.Status.PodIP, process.PID, process.Command, process.WaitingIn)
	if _, err := s.kubectl(ctx, namespace, "delete", "pod", name, "--wait=false"); err != nil {
		return nil, Process{}, err
	}
	if process, err = AwaitStuck(ctx, pod, "D"); err != nil {
		return nil, Process{}, err
	}
	s.Tell("The kubelet has sent SIGKILL. Process %d is now in state D, no signal ends it, and the pod stays Terminating.", process.PID)
	_, err = s.kubectl(ctx, namespace, "get", "pod", name, "-o", "wide")
	return pod, process, err
}

// stillThere checks, from the kernel's side, that process and address are where they were.
func (s *Story) stillThere(pod *corev1.Pod, process Process) error {
	holds, err := HasAddress(process.PID, pod.Status.PodIP)
	if err != nil || !holds {
		return errors.Join(fmt.Errorf("process %d no longer has %s in its network namespace", process.PID, pod.Status.PodIP), err)
	}
	return nil
}

// stage makes a fresh namespace, and a file system whose readers get stuck.
func (s *Story) stage(ctx context.Context, namespace string, labels map[string]string) (*StuckFS, error) {
	if err := s.RemoveNamespace(ctx, namespace); err != nil {
		return nil, err
	}
	if err := s.Namespace(ctx, namespace, labels); err != nil {
		return nil, err
	}
	return s.StartStuckFS(ctx, namespace)
}

// WithoutGuard lets the incident happen, in a namespace that the guard leaves alone.
func (s *Story) WithoutGuard(ctx context.Context) (err error) {
	const namespace = "without-guard"
	stuck, err := s.stage(ctx, namespace, map[string]string{"eni-guard.io/mode": "off"})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stuck.Release()) }()

	old, process, err := s.stuckPod(ctx, stuck, namespace, "payment-0")
	if err != nil {
		return err
	}
	s.Tell("Somebody loses patience.")
	if _, err := s.forceDelete(ctx, namespace, old.Name); err != nil {
		return fmt.Errorf("the force delete did not go through without the guard: %w", err)
	}
	if err := s.AwaitGone(ctx, old); err != nil {
		return err
	}
	if err := s.stillThere(old, process); err != nil {
		return err
	}
	s.Tell("The pod is gone from the API server. On the node nothing has happened: process %d is still there, and so is %s in its network namespace.",
		process.PID, old.Status.PodIP)

	s.Tell("The CNI's garbage collector compares its records with the API server, does not find the pod, and releases the address.")
	err = Wait(ctx, 2*time.Minute, "the address to be released", func(ctx context.Context) error {
		addresses, err := s.Addresses(ctx)
		if err == nil && addresses.IPv4.Next != old.Status.PodIP {
			err = fmt.Errorf("%s is recorded for the pod, and %s is handed out next", addresses.Of(namespace, old.Name), addresses.IPv4.Next)
		}
		return err
	})
	if err != nil {
		return err
	}

	next := Pod(namespace, "payment-1", []string{"sleep", "86400"}, nil)
	s.Tell("The next release starts pod %s on the same node. It is given %s.", next.Name, old.Status.PodIP)
	if next, err = s.CoreV1().Pods(namespace).Create(ctx, next, metav1.CreateOptions{}); err != nil {
		return err
	}
	if err := s.awaitSandboxFailure(ctx, next); err != nil {
		return err
	}
	state, err := s.kubectl(ctx, namespace, "get", "pod", next.Name, "-o", "wide")
	if err != nil || !strings.Contains(state, "ContainerCreating") {
		return errors.Join(fmt.Errorf("pod %s is not in ContainerCreating", next.Name), err)
	}
	failure, err := s.kubectl(ctx, namespace, "get", "events", "--field-selector", "reason=FailedCreatePodSandBox",
		"-o", "custom-columns=OBJECT:.involvedObject.name,REASON:.reason,MESSAGE:.message")
	if err != nil {
		return err
	}
	if !strings.Contains(failure, "address already in use") || !strings.Contains(failure, old.Status.PodIP) {
		return fmt.Errorf("pod %s failed otherwise than in the incident", next.Name)
	}
	s.Tell("This is the incident: the release fails with an address that belongs to no pod of the cluster.")

	if err := stuck.Release(); err != nil {
		return err
	}
	s.Tell("(The process is let go now. The node cleans up, and pod %s starts after all.)", next.Name)
	if _, err := s.AwaitStarted(ctx, namespace, next.Name); err != nil {
		return err
	}
	return s.RemoveNamespace(ctx, namespace)
}

// awaitSandboxFailure waits for the event of the incident.
func (s *Story) awaitSandboxFailure(ctx context.Context, pod *corev1.Pod) error {
	return Wait(ctx, 2*time.Minute, "an event FailedCreatePodSandBox of pod "+pod.Name, func(ctx context.Context) error {
		events, err := s.CoreV1().Events(pod.Namespace).List(ctx, metav1.ListOptions{
			FieldSelector: "reason=FailedCreatePodSandBox,involvedObject.uid=" + string(pod.UID),
		})
		if err == nil && len(events.Items) == 0 {
			err = errors.New("there is none")
		}
		return err
	})
}

// WithGuard tries the same where the guard watches, and shows that it cannot happen.
func (s *Story) WithGuard(ctx context.Context) (err error) {
	const namespace = "with-guard"
	stuck, err := s.stage(ctx, namespace, nil)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stuck.Release()) }()

	old, process, err := s.stuckPod(ctx, stuck, namespace, "payment-0")
	if err != nil {
		return err
	}
	parts := []string{
		`admission webhook "force-delete.eni-guard.io" denied the request`,
		fmt.Sprintf("process %d (%s) is in state D", process.PID, process.Command), "sandbox ", "address " + old.Status.PodIP + " still in use",
	}
	saysAll := func(refusal string) error {
		for _, part := range parts {
			if !strings.Contains(refusal, part) {
				return fmt.Errorf("the refusal does not say %q", part)
			}
		}
		return nil
	}
	// On a busy node a look may not get to its end, and what it has found by then is enough to refuse. The story is to show everything, so it
	// waits until that can be expected.
	err = Wait(ctx, 2*time.Minute, "the guard to see everything of pod "+old.Name, func(ctx context.Context) error {
		err := s.CoreV1().Pods(namespace).Delete(ctx, old.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0)), DryRun: []string{metav1.DryRunAll}})
		if err == nil {
			return errors.New("it would let the pod go")
		}
		return saysAll(err.Error())
	})
	if err != nil {
		return err
	}
	s.Tell("Somebody loses patience again.")
	refusal, err := s.forceDelete(ctx, namespace, old.Name)
	if err == nil {
		return errors.New("the force delete went through in spite of the guard")
	}
	if err := saysAll(refusal); err != nil {
		return err
	}
	if err := s.stillThere(old, process); err != nil {
		return err
	}
	record, err := s.Refusal(old)
	if err != nil {
		return err
	}
	s.Tell("Refused, with what is still on the node. The audit log of the API server has it on record:")
	s.Show("", record)

	s.Tell("The garbage collector of the CNI passes, finds the pod in the API server, and leaves %s alone.", old.Status.PodIP)
	if err := s.AwaitCollection(ctx); err != nil {
		return err
	}
	if now, err := s.CoreV1().Pods(namespace).Get(ctx, old.Name, metav1.GetOptions{}); err != nil || now.UID != old.UID {
		return errors.Join(errors.New("the refused pod is not in the API server any more"), err)
	}
	addresses, err := s.Addresses(ctx)
	if err != nil {
		return err
	}
	if addresses.Of(namespace, old.Name) != old.Status.PodIP {
		return fmt.Errorf("address %s is not recorded for pod %s any more", old.Status.PodIP, old.Name)
	}

	next, err := s.Start(ctx, Pod(namespace, "payment-1", []string{"sleep", "86400"}, nil))
	if err != nil {
		return err
	}
	if next.Status.PodIP == old.Status.PodIP {
		return fmt.Errorf("pod %s was given the address of the stuck pod", next.Name)
	}
	s.Tell("The next release starts on the same node, gets an address of its own and runs.")
	if _, err := s.kubectl(ctx, namespace, "get", "pods", "-o", "wide"); err != nil {
		return err
	}

	if err := stuck.Release(); err != nil {
		return err
	}
	s.Tell("The cause is mended: process %d is let go.", process.PID)
	if err := s.AwaitGone(ctx, old); err != nil {
		return err
	}
	if err := s.awaitReleased(ctx, old); err != nil {
		return err
	}
	s.Tell("The pod has ended by itself, and %s is back in the pool.", old.Status.PodIP)

	if err := s.ReallyGone(ctx, namespace); err != nil {
		return err
	}
	return s.RemoveNamespace(ctx, namespace)
}

// ReallyGone shows that a force delete of a pod that has nothing left on its node goes through.
func (s *Story) ReallyGone(ctx context.Context, namespace string) error {
	done, err := s.Start(ctx, Pod(namespace, "migration", []string{"true"}, func(pod *corev1.Pod) {
		pod.Spec.RestartPolicy = corev1.RestartPolicyNever
	}))
	if err != nil {
		return err
	}
	if err := errors.Join(s.AwaitFinished(ctx, done), s.awaitReleased(ctx, done)); err != nil {
		return err
	}
	// The runtime closes the network namespace a moment after the CNI has released the address.
	err = Wait(ctx, 2*time.Minute, "nothing of pod "+done.Name+" to be left on its node", func(ctx context.Context) error {
		err := s.CoreV1().Pods(namespace).Delete(ctx, done.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0)), DryRun: []string{metav1.DryRunAll}})
		if err != nil {
			return err
		}
		// What its kubelet has reported of a finished pod is enough to let it go, where its node cannot tell.
		return s.foundReleased(done)
	})
	if err != nil {
		return err
	}
	s.Tell("Pod %s has run to its end, and nothing of it is left on the node. Its force delete goes through:", done.Name)
	if _, err := s.forceDelete(ctx, namespace, done.Name); err != nil {
		return fmt.Errorf("the force delete of a pod that is really gone was refused: %w", err)
	}
	return errors.Join(s.foundReleased(done), s.Gone(ctx, done))
}

// foundReleased returns nil if the audit log says of the last answer about a pod that its node was asked and had nothing left of it.
func (s *Story) foundReleased(pod *corev1.Pod) error {
	events, err := s.Removals(pod)
	if err != nil || len(events) == 0 || events[len(events)-1].Annotation("verdict") != "released" {
		return errors.Join(fmt.Errorf("the audit log does not say that the node of pod %s was asked and had nothing left of it", pod.Name), err)
	}
	return nil
}

// awaitReleased waits until the CNI has no address recorded for a pod.
func (s *Story) awaitReleased(ctx context.Context, pod *corev1.Pod) error {
	return Wait(ctx, 2*time.Minute, "the address of pod "+pod.Name+" to be back in the pool", func(ctx context.Context) error {
		addresses, err := s.Addresses(ctx)
		if address := addresses.Of(pod.Namespace, pod.Name); err == nil && address != "" {
			err = fmt.Errorf("%s is recorded for it", address)
		}
		return err
	})
}
