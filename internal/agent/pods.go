package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

// likelyKubeconfigs are where the kubelets of common distributions, or administrators, have their way to the API server.
var likelyKubeconfigs = []string{
	"/etc/kubernetes/kubelet.conf", "/etc/kubernetes/admin.conf", "/var/lib/kubelet/kubeconfig", "/etc/rancher/k3s/k3s.yaml", "/var/lib/k0s/kubelet.conf",
}

// apiConfig finds the way to the API server: a kubeconfig that is named, or else one of whoever runs this (KUBECONFIG, or
// ~/.kube/config), or else the service account of the pod this runs in. from says in words which of them it is.
func apiConfig(kubeconfig string) (config *rest.Config, from string, err error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = kubeconfig
	files := existing(rules.GetLoadingPrecedence())
	if kubeconfig != "" {
		if _, err := os.Stat(kubeconfig); err != nil {
			return nil, "", fmt.Errorf("--kubeconfig: %w", err)
		}
		files = []string{kubeconfig}
	}
	if len(files) == 0 {
		config, err = rest.InClusterConfig()
		if errors.Is(err, rest.ErrNotInCluster) {
			missing := ""
			if named := os.Getenv(clientcmd.RecommendedConfigPathEnvVar); named != "" {
				missing = " (the environment variable KUBECONFIG names " + named + ", which is not there)"
			}
			return nil, "", errors.New("there is no kubeconfig" + missing + ": name one by --kubeconfig, such as " + suggested(likelyKubeconfigs))
		}
		return config, "the service account of this pod", err
	}
	from = "kubeconfig " + strings.Join(files, " and ")
	config, err = clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil).ClientConfig()
	if clientcmd.IsEmptyConfig(err) {
		err = errors.New("it names no API server; --kubeconfig names another one")
	}
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", from, err)
	}
	return config, from, nil
}

// existing are those of the files that are there.
func existing(files []string) []string {
	return slices.DeleteFunc(slices.Clone(files), func(file string) bool { _, err := os.Stat(file); return err != nil })
}

// suggested are those of the likely files that are there, or the likeliest where none is.
func suggested(likely []string) string {
	if there := existing(likely); len(there) > 0 {
		return strings.Join(there, " or ") + ", which this host has"
	}
	return likely[0]
}

// podResource is what the agent asks the API server for, metadata only.
var podResource = corev1.SchemeGroupVersion.WithResource("pods")

// nodeUIDIndex is of the pods by nodeUID: each look asks about every pod of the node.
const nodeUIDIndex = "nodeUID"

// nodePods are the pods that the API server has for a node. It implements knownPods.
type nodePods struct {
	client   metadata.Interface
	node     string
	informer cache.SharedIndexInformer
}

func newNodePods(config *rest.Config, node string) (*nodePods, error) {
	client, err := metadata.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	p := &nodePods{client: client, node: node}
	byUID := cache.Indexers{nodeUIDIndex: func(object any) ([]string, error) {
		pod, ok := object.(*metav1.PartialObjectMetadata)
		if !ok {
			return nil, fmt.Errorf("%T is not a pod's metadata", object)
		}
		return []string{nodeUID(pod)}, nil
	}}
	p.informer = metadatainformer.NewFilteredMetadataInformer(client, podResource, metav1.NamespaceAll, 0, byUID, func(o *metav1.ListOptions) {
		o.FieldSelector = p.selector()
	}).Informer()
	return p, p.informer.SetTransform(trimPod)
}

// watch fills the cache and keeps it up to date until ctx ends, and calls gone when a pod has left it.
func (p *nodePods) watch(ctx context.Context, gone func()) error {
	_, err := p.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{DeleteFunc: func(any) { gone() }})
	if err != nil {
		return err
	}
	go p.informer.RunWithContext(ctx)
	if !cache.WaitForCacheSync(ctx.Done(), p.informer.HasSynced) {
		return ctx.Err()
	}
	return nil
}

// trimPod keeps of a pod what tells it from others.
func trimPod(object any) (any, error) {
	pod, ok := object.(*metav1.PartialObjectMetadata)
	if !ok {
		return object, nil
	}
	trimmed := &metav1.PartialObjectMetadata{TypeMeta: pod.TypeMeta}
	trimmed.Namespace, trimmed.Name, trimmed.UID, trimmed.ResourceVersion = pod.Namespace, pod.Name, pod.UID, pod.ResourceVersion
	if hash, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey]; mirror {
		trimmed.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: hash}
	}
	return trimmed, nil
}

func (p *nodePods) known(uid string) bool {
	found, err := p.informer.GetIndexer().IndexKeys(nodeUIDIndex, uid)
	return err == nil && len(found) > 0
}

func (p *nodePods) selector() string {
	return fields.OneTermEqualSelector("spec.nodeName", p.node).String()
}

// listTimeout is how long the API server may take to list the pods of a node.
const listTimeout = 10 * time.Second

func (p *nodePods) live(ctx context.Context) (map[string]bool, error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	list, err := p.client.Resource(podResource).List(ctx, metav1.ListOptions{FieldSelector: p.selector()})
	if err != nil {
		return nil, fmt.Errorf("listing the pods of node %s: %w", p.node, err)
	}
	known := map[string]bool{}
	for _, pod := range list.Items {
		known[nodeUID(&pod)] = true
	}
	return known, nil
}

// nodeExists returns an error if the API server has no such node, whose list of pods would be empty too.
func (p *nodePods) nodeExists(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	_, err := p.client.Resource(corev1.SchemeGroupVersion.WithResource("nodes")).Get(ctx, p.node, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return fmt.Errorf("the API server has no node %s; name this one as `kubectl get nodes` does, by --node-name", p.node)
	case err != nil:
		return fmt.Errorf("the API server has no pods for node %s, and whether it has the node could not be read: %w", p.node, err)
	}
	return nil
}

// nodeUID is the UID by which a node knows a pod: its own, or, for the mirror of a static pod, the static pod's (kubelet:
// pkg/kubelet/types.ConfigMirrorAnnotationKey).
func nodeUID(pod *metav1.PartialObjectMetadata) string {
	if uid := pod.Annotations[corev1.MirrorPodAnnotationKey]; uid != "" {
		return uid
	}
	return string(pod.UID)
}
