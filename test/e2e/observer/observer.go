package observer

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
)

const (
	// period is the time between the beginnings of two looks, where nothing calls for one at once.
	period = 200 * time.Millisecond
	// listTimeout bounds one list, and retryDelay is the time after one that failed.
	listTimeout = 10 * time.Second
	retryDelay  = 100 * time.Millisecond
)

// Observer watches the pods of some namespaces, and the node.
type Observer struct {
	*Ledger
	client kubernetes.Interface
	// prefix starts the names of the namespaces.
	prefix string
	owners func(context.Context) (map[netip.Addr]string, error)
	kick   chan struct{}

	mu       sync.Mutex
	watches  int
	looks    int
	longest  time.Duration
	failures []error
}

// Start observes, until ctx ends, the pods of namespaces whose name begins with prefix. owners reads who has which address by the
// records of those who hand them out: by address, NAMESPACE/NAME.
func Start(ctx context.Context, client kubernetes.Interface, prefix string, owners func(context.Context) (map[netip.Addr]string, error)) (o *Observer, wait func()) {
	o = &Observer{Ledger: NewLedger(), client: client, prefix: prefix, owners: owners, kick: make(chan struct{}, 1)}
	var all sync.WaitGroup
	all.Go(func() { o.look(ctx) })
	all.Go(func() { o.watch(ctx) })
	return o, all.Wait
}

// Effort says how often the watch began anew and how many looks were made, how long the longest took, and what
// went wrong with them.
func (o *Observer) Effort() (watches, looks int, longest time.Duration, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.watches, o.looks, o.longest, errors.Join(o.failures...)
}

func (o *Observer) look(ctx context.Context) {
	tick := time.NewTicker(period)
	defer tick.Stop()
	var before, after map[netip.Addr]string
	for ctx.Err() == nil {
		sight, err := Look()
		// Where the records cannot be read, as before the first pod, they are not compared.
		before = after
		after, _ = o.owners(ctx)
		o.mu.Lock()
		o.looks++
		o.longest = max(o.longest, sight.Ended.Sub(sight.Began))
		if err != nil {
			o.failures = append(o.failures, err)
		}
		o.mu.Unlock()
		if err == nil {
			o.Looked(sight, before, after)
		}
		select {
		case <-ctx.Done():
		case <-tick.C:
		case <-o.kick:
		}
	}
}

// watch follows the pods. After each interruption it lists them: what is no longer there has gone meanwhile.
func (o *Observer) watch(ctx context.Context) {
	for ctx.Err() == nil {
		version, err := o.relist(ctx)
		if err == nil {
			o.mu.Lock()
			o.watches++
			o.mu.Unlock()
			err = o.follow(ctx, version)
		}
		if err != nil {
			select {
			case <-ctx.Done():
			case <-time.After(retryDelay):
			}
		}
	}
}

func (o *Observer) relist(ctx context.Context) (version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	known := o.Present()
	list, err := o.client.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", err
	}
	now := time.Now()
	there := map[types.UID]bool{}
	for i := range list.Items {
		there[list.Items[i].UID] = true
		o.seen(&list.Items[i])
	}
	for _, uid := range known {
		if !there[uid] {
			o.Gone(uid, now, true)
		}
	}
	o.lookNow()
	return list.ResourceVersion, nil
}

func (o *Observer) follow(ctx context.Context, version string) error {
	w, err := o.client.CoreV1().Pods("").Watch(ctx, metav1.ListOptions{ResourceVersion: version})
	if err != nil {
		return err
	}
	defer w.Stop()
	for event := range w.ResultChan() {
		pod, ok := event.Object.(*corev1.Pod)
		if !ok {
			return fmt.Errorf("the watch ended: %v", event.Object)
		}
		o.seen(pod)
		if event.Type == watch.Deleted {
			o.Gone(pod.UID, time.Now(), false)
			o.lookNow()
		}
	}
	return errors.New("the watch ended")
}

func (o *Observer) seen(pod *corev1.Pod) {
	if strings.HasPrefix(pod.Namespace, o.prefix) && !pod.Spec.HostNetwork {
		o.Seen(pod)
	}
}

// lookNow has a look made without waiting for its time.
func (o *Observer) lookNow() {
	select {
	case o.kick <- struct{}{}:
	default:
	}
}
