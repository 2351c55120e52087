package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	corev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	// defaultPeriod is Terway's constant.
	defaultPeriod = 5 * time.Minute
	// requestTimeout bounds each call to the API server.
	requestTimeout = 30 * time.Second
)

func newGCCommand() *cobra.Command {
	var kubeconfig string
	var period time.Duration
	c := collector{log: slog.New(slog.NewJSONHandler(os.Stderr, nil))}
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Release, again and again, the addresses of pods that the API server no longer has",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if period < time.Second {
				return fmt.Errorf("--period %s is below one second", period)
			}
			config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
			if err != nil {
				return fmt.Errorf("--kubeconfig: %w", err)
			}
			config.Timeout = requestTimeout
			client, err := kubernetes.NewForConfig(config)
			if err != nil {
				return fmt.Errorf("--kubeconfig: %w", err)
			}
			c.pods = client.CoreV1()
			c.run(cmd.Context(), period)
			return nil
		},
	}
	cmd.Flags().StringVar(&kubeconfig, "kubeconfig", "", "the file that says how to reach the API server")
	cmd.Flags().StringVar(&c.store.dir, "state-dir", "", "stateDir of the network configuration")
	cmd.Flags().StringVar(&c.node, "node", "", "name of this node in the API server")
	cmd.Flags().DurationVar(&period, "period", defaultPeriod, "time between two rounds, and before the first; at least 1s")
	for _, flag := range []string{"kubeconfig", "state-dir", "node"} {
		if err := cmd.MarkFlagRequired(flag); err != nil {
			panic(err) // a wrong name above
		}
	}
	return cmd
}

// collector releases addresses by Terway's rule (gcPods in its daemon/daemon.go): what the API server has counts, and
// what is on the node does not.
type collector struct {
	store store
	pods  corev1.PodsGetter
	node  string
	log   *slog.Logger
}

// run does a round after each period until the context ends.
func (c *collector) run(ctx context.Context, period time.Duration) {
	tick := time.NewTicker(period)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		switch err := c.collect(ctx); {
		case ctx.Err() != nil:
			return
		case err != nil:
			c.log.Error("nothing released", "error", err)
		default:
			c.log.Info("collected") // a whole round: who waits for one counts these
		}
	}
}

// collect does one round. If the API server does not answer every question, it releases nothing.
func (c *collector) collect(ctx context.Context) error {
	// The records come first: the pods they name were there before the list is made.
	before, err := c.store.load()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || len(before.Records) == 0 {
		return err
	}
	missing, err := c.missing(ctx, slices.Sorted(maps.Keys(before.Records)))
	if err != nil || len(missing) == 0 {
		return err
	}

	unlock, err := c.store.lock()
	if err != nil {
		return err
	}
	defer unlock()
	now, err := c.store.load()
	if err != nil {
		return err
	}
	var released []string
	for _, pod := range missing {
		// A new sandbox may have taken the record over since, for a new pod of that name.
		if now.Records[pod] == before.Records[pod] {
			now.release(pod)
			released = append(released, pod)
		}
	}
	if err := c.store.save(now); err != nil {
		return err
	}
	for _, pod := range released {
		c.log.Info("released", "pod", pod, "addresses", before.Records[pod].addresses())
	}
	return nil
}

// missing returns those of the pods that the API server does not have on this node, in any phase: not in its list, and
// not when asked for by name (Terway's PodExist).
func (c *collector) missing(ctx context.Context, pods []string) ([]string, error) {
	list, err := c.pods.Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("spec.nodeName", c.node).String(),
	})
	if err != nil {
		return nil, fmt.Errorf("list the pods of node %s: %w", c.node, err)
	}
	listed := map[string]bool{}
	for _, pod := range list.Items {
		listed[pod.Namespace+"/"+pod.Name] = true
	}
	var missing []string
	for _, key := range pods {
		if listed[key] {
			continue
		}
		namespace, name, _ := strings.Cut(key, "/")
		pod, err := c.pods.Pods(namespace).Get(ctx, name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			missing = append(missing, key)
		case err != nil:
			return nil, fmt.Errorf("get pod %s: %w", key, err)
		case pod.Spec.NodeName != c.node: // of the same name, but another one
			missing = append(missing, key)
		}
	}
	return missing, nil
}
