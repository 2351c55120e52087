package main

import (
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	monitoringv1 "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/pod-security-admission/api"
	"k8s.io/pod-security-admission/policy"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	"sigs.k8s.io/yaml"
)

const repo = "../.."

// values reads values as people write them.
func values(t *testing.T, text string) map[string]any {
	t.Helper()
	var v map[string]any
	if err := yaml.Unmarshal([]byte(text), &v); err != nil {
		t.Fatal(err)
	}
	return v
}

// objects returns what the chart makes, hooks included, by kind and name.
func objects(t *testing.T, c cluster, v map[string]any) map[string]*unstructured.Unstructured {
	t.Helper()
	made, err := render(repo, c, v)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]*unstructured.Unstructured{}
	for _, document := range slices.Concat(made.objects, made.hooks) {
		object := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(document), object); err != nil {
			t.Fatalf("%v\n%s", err, document)
		}
		found[object.GetKind()+" "+object.GetName()] = object
	}
	return found
}

func field[T any](t *testing.T, object *unstructured.Unstructured, path ...string) T {
	t.Helper()
	value, found, err := unstructured.NestedFieldNoCopy(object.Object, path...)
	typed, is := value.(T)
	if err != nil || !found || !is {
		t.Fatalf("%s %s has the %s %v (%v)", object.GetKind(), object.GetName(), strings.Join(path, "."), value, err)
	}
	return typed
}

// A wrong value is refused with its path, and with what is wrong with it.
func TestWrongValuesAreRefused(t *testing.T) {
	long := strings.Repeat("a", 64)
	for text, want := range map[string]string{
		"webhok: {replicaCount: 3}":                                    "additional properties 'webhok' not allowed",
		"webhook: {replicas: 3}":                                       "at '/webhook': additional properties 'replicas' not allowed",
		"webhook: null":                                                "missing property 'webhook'",
		"webhook: {replicaCount: null}":                                "at '/webhook': missing property 'replicaCount'",
		"webhook: {replicaCount: 0}":                                   "at '/webhook/replicaCount'",
		"webhook: {replicaCount: '2'}":                                 "at '/webhook/replicaCount': got string, want integer",
		"webhook: {timeoutSeconds: 31}":                                "at '/webhook/timeoutSeconds'",
		"webhook: {timeoutSeconds: 6}":                                 "webhook.timeoutSeconds (6) must be at least 2 above webhook.agentTimeoutSeconds (5)",
		"webhook: {failurePolicy: fail}":                               "at '/webhook/failurePolicy'",
		"webhook: {podDisruptionBudget: {maxUnavailable: 0}}":          "at '/webhook/podDisruptionBudget/maxUnavailable'",
		"webhook: {podDisruptionBudget: {maxUnavailable: 0%}}":         "at '/webhook/podDisruptionBudget/maxUnavailable'",
		"webhook: {topologySpreadConstraints: [{maxSkew: 1}]}":         "at '/webhook/topologySpreadConstraints/0': missing properties",
		"webhook: {resources: {requests: {memory: 64MB}}}":             "at '/webhook/resources/requests/memory'",
		"webhook: {tolerations: [{keys: a}]}":                          "at '/webhook/tolerations/0': additional properties 'keys' not allowed",
		"webhook: {affinity: {podAffinty: {}}}":                        "at '/webhook/affinity': additional properties 'podAffinty' not allowed",
		"webhook: {podAnnotations: {a: 1}}":                            "at '/webhook/podAnnotations/a': got number, want string",
		"webhook: {networkPolicy: {reviewsFrom: [10.0.0.0/8]}}":        "at '/webhook/networkPolicy/reviewsFrom/0': got string, want object",
		"agent: {port: 0}":                                             "at '/agent/port'",
		"agent: {metricsPort: 9807}":                                   "agent.port (9807), agent.healthPort (9808) and agent.metricsPort (9807) must differ",
		"agent: {criSocket: run/containerd.sock}":                      "at '/agent/criSocket'",
		"agent: {criSocket: /containerd.sock}":                         "at '/agent/criSocket'",
		"agent: {leftoverGraceSeconds: 0}":                             "at '/agent/leftoverGraceSeconds'",
		"certificates: null":                                           "missing property 'certificates'",
		"certificates: {validity: null}":                               "at '/certificates': missing property 'validity'",
		"certManager: null":                                            "missing property 'certManager'",
		"certManager: {enabled: null}":                                 "at '/certManager': missing property 'enabled'",
		"webhook: {priorityClassName: A B}":                            "at '/webhook/priorityClassName'",
		"mode: warn":                                                   "at '/mode'",
		"excludedNodes: type=virtual-kubelet":                          "at '/excludedNodes': got string, want array",
		"excludedNodes: [type=a, b c]":                                 `excludedNodes[1]: "b c" is not a label selector`,
		"exemptNamespaces: ['kube-*']":                                 "at '/exemptNamespaces/0'",
		"image: {repository: 'Registry/eni-guard'}":                    "at '/image/repository'",
		"image: {repository: r.io/a/b:v1}":                             "at '/image/repository'",
		"image: {repository: r.io:5000/a/b:v1}":                        "at '/image/repository'",
		"image: {repository: 'r.io:5000'}":                             "at '/image/repository'",
		"image: {repository: 'https://r.io/a'}":                        "at '/image/repository'",
		"image: {repository: r.io//a}":                                 "at '/image/repository'",
		"image: {tag: 'a b'}":                                          "at '/image/tag'",
		"image: {digest: 'sha256:12'}":                                 "at '/image/digest'",
		"imagePullSecrets: [{name: A_B}]":                              "at '/imagePullSecrets/0/name': 'A_B' does not match pattern",
		"imagePullSecrets: [registry]":                                 "at '/imagePullSecrets/0': got string, want object",
		"commonLabels: {app.kubernetes.io/name: x}":                    "at '/commonLabels/app.kubernetes.io~1name'",
		"webhook: {podLabels: {'a b': x}}":                             "at '/webhook/podLabels': additional properties 'a b' not allowed",
		"webhook: {podLabels: {a/b/c: x}}":                             "at '/webhook/podLabels': additional properties 'a/b/c' not allowed",
		"webhook: {podLabels: {eni-guard.io/mode: x}}":                 "at '/webhook/podLabels/eni-guard.io~1mode'",
		"agent: {podLabels: {a: 'b c'}}":                               "at '/agent/podLabels/a': 'b c' does not match pattern",
		"agent: {podLabels: {a: -b}}":                                  "at '/agent/podLabels/a': '-b' does not match pattern",
		"agent: {podAnnotations: {'a b': x}}":                          "at '/agent/podAnnotations': additional properties 'a b' not allowed",
		"agent: {nodeSelector: {'a=b': x}}":                            "at '/agent/nodeSelector': additional properties 'a=b' not allowed",
		"commonLabels: {team: " + long + "}":                           "at '/commonLabels/team': maxLength: got 64, want 63",
		"commonLabels: {" + long + ": team}":                           "at '/commonLabels': additional properties '" + long + "' not allowed",
		"grafana: {dashboard: {annotations: {/folder: x}}}":            "at '/grafana/dashboard/annotations': additional properties '/folder' not allowed",
		"prometheus: {rule: {labels: {release: 'a b'}}}":               "at '/prometheus/rule/labels/release': 'a b' does not match pattern",
		"webhook: {resources: {requests: {memory: 256Mi}}}":            "webhook.resources.requests.memory (256Mi) must not be above webhook.resources.limits.memory (192Mi)",
		"agent: {resources: {limits: {memory: 32000k}}}":               "agent.resources.requests.memory (40Mi) must not be above agent.resources.limits.memory (32000k)",
		"agent: {resources: {limits: {cpu: 19m}}}":                     "agent.resources.requests.cpu (20m) must not be above agent.resources.limits.cpu (19m)",
		"agent: {resources: {requests: {cpu: 1}, limits: {cpu: 0.5}}}": "agent.resources.requests.cpu (1) must not be above agent.resources.limits.cpu (0.5)",
		"prometheus: {podMonitor: {interval: 30}}":                     "at '/prometheus/podMonitor/interval': got number, want string",
		"grafana: {dashboard: {label: {}}}":                            "at '/grafana/dashboard': additional properties 'label' not allowed",

		"webhook: {networkPolicy: {reviewsFrom: [{ipBlock: {cidr: 10.0.0.1}}]}}": "at '/webhook/networkPolicy/reviewsFrom/0/ipBlock/cidr'",
		"webhook: {networkPolicy: {metricsFrom: [{}]}}":                          "at '/webhook/networkPolicy/metricsFrom/0': minProperties",
	} {
		t.Run(text, func(t *testing.T) {
			_, err := render(repo, cluster{version: newest}, values(t, text))
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v\nwant %q", err, want)
			}
		})
	}
}

// What is right at the edge is taken.
func TestValuesAtTheEdgeAreTaken(t *testing.T) {
	long := strings.Repeat("a", 63)
	for _, text := range []string{
		"commonLabels: {" + long + ": " + long + ", example.com/team: '', a.b-c/D_e.F: 1.0-rc_1}",
		"webhook: {podAnnotations: {example.com/Why: 'any text: ä'}}",
		"image: {repository: eni-guard}",
		"webhook: {networkPolicy: {reviewsFrom: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}, {ipBlock: {cidr: 'fd00::/8'}}]}}",
		"image: {repository: 'r-1.example.com:5000/a_b/c__d/e--f.g'}",
		"image: {repository: '10.0.0.1:5000/a'}",
		"agent: {resources: {requests: {cpu: 1000m}, limits: {cpu: 1}}}",
		"agent: {resources: {requests: {memory: 1Gi}, limits: {memory: 1024Mi}}}",
		"webhook: {resources: {requests: null}, priorityClassName: ''}",
		"webhook: {resources: {limits: null, requests: {cpu: 2}}}",
	} {
		if _, err := render(repo, cluster{version: newest}, values(t, text)); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// The calls of one removal reach the replica that has decided, because no connection leads to another one. If the affinity ended while older
// connections are in use, a new one could lead elsewhere.
func TestCallsOfOneRemovalReachOneReplica(t *testing.T) {
	service := objects(t, cluster{version: newest}, nil)["Service eni-guard-webhook"]
	if affinity := field[string](t, service, "spec", "sessionAffinity"); affinity != "ClientIP" {
		t.Errorf("the session affinity is %s", affinity)
	}
	if config, found := field[map[string]any](t, service, "spec")["sessionAffinityConfig"]; found {
		t.Errorf("it is limited: %v", config)
	}
}

// excludedNodes takes what the webhook takes as a label selector, and nothing else.
func TestExcludedNodesAreLabelSelectors(t *testing.T) {
	long := strings.Repeat("a", 63)
	for _, selector := range []string{
		"type=virtual-kubelet", "type==virtual-kubelet", "type!=virtual-kubelet", "type", "!type", "! type", "a=", "kubernetes.io/os=windows",
		"a in (b)", "a in (b, c),!d", "a notin (b,c)", "a=b,c=d", "cores>8", "cores < 8", " a = b ",
		"", "a b", "=", "a=b c", "a in b", "a in (b", "A/b/c=d", "a==b==c", ",", "a,", "-a=b", "a=-b", "a=b;c=d", "cores>many",
		long, "example.com/" + long, long + "x", "a=" + long, "a=" + long + "x", "a in (" + long + "x)", "a.b/c", "a..b/c", "a.-b/c", ".a/b",
	} {
		_, parsed := labels.Parse(selector)
		_, rendered := render(repo, cluster{version: newest}, map[string]any{"excludedNodes": []any{selector}})
		// An empty one would select every node.
		if taken := parsed == nil && selector != ""; taken != (rendered == nil) {
			t.Errorf("%q: the chart says %v, the library %v", selector, rendered, parsed)
		}
	}
}

// A cluster that lacks a kind, or is too old, is told so, and which value asks for it.
func TestWhatAClusterLacksIsNamed(t *testing.T) {
	for value, api := range map[string]string{"serviceMonitor": "ServiceMonitor", "podMonitor": "PodMonitor", "rule": "PrometheusRule"} {
		v := map[string]any{"prometheus": map[string]any{value: enabled}}
		_, err := render(repo, cluster{version: newest}, v)
		want := "prometheus." + value + ".enabled is true, but this cluster has no monitoring.coreos.com/v1/" + api
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v\nwant %q", err, want)
		}
		if _, made := objects(t, cluster{newest, monitoring}, v)[api+" "+map[string]string{
			"serviceMonitor": "eni-guard-webhook", "podMonitor": "eni-guard-agent", "rule": "eni-guard"}[value]]; !made {
			t.Errorf("no %s is made where the cluster has the kind", api)
		}
	}
	_, err := render(repo, cluster{version: "1.24.17"}, nil)
	if err == nil || !strings.Contains(err.Error(), "requires kubeVersion: >=1.25.0-0 which is incompatible with Kubernetes v1.24.17") {
		t.Error(err)
	}
}

// What is made for the Prometheus operator has no field that its own types lack.
func TestThePrometheusOperatorKnowsEveryField(t *testing.T) {
	made := objects(t, cluster{newest, monitoring}, everything)
	for name, into := range map[string]any{
		"ServiceMonitor eni-guard-webhook": &monitoringv1.ServiceMonitor{}, "PodMonitor eni-guard-agent": &monitoringv1.PodMonitor{},
		"PrometheusRule eni-guard": &monitoringv1.PrometheusRule{},
	} {
		content, err := yaml.Marshal(made[name].Object)
		if err != nil {
			t.Fatal(err)
		}
		if err := yaml.UnmarshalStrict(content, into); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestImages(t *testing.T) {
	digest := "sha256:" + strings.Repeat("0123456789abcdef", 4)
	for text, want := range map[string]string{
		"{}": "eni-guard.io/eni-guard:0.1.0",
		"image: {repository: r.io:5000/a/b, tag: v1}": "r.io:5000/a/b:v1",
		"image: {digest: '" + digest + "'}":           "eni-guard.io/eni-guard:0.1.0@" + digest,
	} {
		images := 0
		for name, object := range objects(t, cluster{version: newest}, values(t, text)) {
			for _, container := range podSpec(t, object).Containers {
				images++
				if container.Image != want {
					t.Errorf("%s: %s runs %s, want %s", text, name, container.Image, want)
				}
			}
		}
		if images < 4 {
			t.Errorf("%d images are named, want those of webhook, agent, test and uninstall", images)
		}
	}
}

// podSpec is the pod that an object makes; an empty one if it makes none.
func podSpec(t *testing.T, object *unstructured.Unstructured) corev1.PodSpec {
	t.Helper()
	path := []string{"spec", "template", "spec"}
	if object.GetKind() == "Pod" {
		path = path[:1]
	}
	var spec corev1.PodSpec
	content, found, _ := unstructured.NestedMap(object.Object, path...)
	if found && !strings.Contains(object.GetAPIVersion(), "admissionregistration") {
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(content, &spec); err != nil {
			t.Fatal(err)
		}
	}
	return spec
}

// Every pod but the agents' has the Pod Security level "restricted", by the library that enforces it.
func TestPodsAreRestricted(t *testing.T) {
	evaluator, err := policy.NewEvaluator(policy.DefaultChecks(), nil)
	if err != nil {
		t.Fatal(err)
	}
	level := api.LevelVersion{Level: api.LevelRestricted, Version: api.LatestVersion()}
	checked := map[string]bool{}
	for name, object := range objects(t, cluster{newest, monitoring}, everything) {
		spec := podSpec(t, object)
		if len(spec.Containers) == 0 {
			continue
		}
		result := policy.AggregateCheckResults(evaluator.EvaluatePod(level, &metav1.ObjectMeta{Labels: object.GetLabels(), Annotations: object.GetAnnotations()}, &spec))
		checked[name] = result.Allowed
		if agent := object.GetKind() == "DaemonSet"; result.Allowed == agent {
			t.Errorf("%s: restricted: %v %s", name, result.Allowed, result.ForbiddenDetail())
		}
	}
	for _, name := range []string{"Deployment eni-guard-webhook", "Job eni-guard-free-held", "Pod eni-guard-test", "DaemonSet eni-guard-agent"} {
		if _, was := checked[name]; !was {
			t.Errorf("%s was not looked at", name)
		}
	}
}

// Where nodes have AppArmor, the profile that a runtime gives by itself would blind the agent.
func TestTheAgentHasNoAppArmorProfile(t *testing.T) {
	const annotation = "container.apparmor.security.beta.kubernetes.io/agent"
	for _, test := range []struct {
		version          string
		annotated, field bool
	}{{newest, false, true}, {"1.30.0", false, true}, {"1.29.15", true, false}} {
		for _, text := range []string{"{}", "agent: {podAnnotations: {example.com/a: b}}"} {
			agent := objects(t, cluster{version: test.version}, values(t, text))["DaemonSet eni-guard-agent"]
			annotations, _, err := unstructured.NestedStringMap(agent.Object, "spec", "template", "metadata", "annotations")
			if err != nil {
				t.Fatal(err)
			}
			profile := podSpec(t, agent).Containers[0].SecurityContext.AppArmorProfile
			unconfined := profile != nil && profile.Type == corev1.AppArmorProfileTypeUnconfined
			if (annotations[annotation] == "unconfined") != test.annotated || unconfined != test.field || (annotations["example.com/a"] == "b") != (text != "{}") {
				t.Errorf("%s, %s: annotations %v, profile %v", test.version, text, annotations, profile)
			}
		}
	}
}

// Whoever has a profile made for the agent names it as one names annotations.
func TestAnAppArmorProfileOfTheUser(t *testing.T) {
	text := "agent: {podAnnotations: {container.apparmor.security.beta.kubernetes.io/agent: localhost/eni-guard}}"
	agent := objects(t, cluster{version: "1.29.15"}, values(t, text))["DaemonSet eni-guard-agent"]
	if got := field[string](t, agent, "spec", "template", "metadata", "annotations", "container.apparmor.security.beta.kubernetes.io/agent"); got != "localhost/eni-guard" {
		t.Errorf("it has the profile %s", got)
	}
}

// Calls that are under way when the guard is switched off may hold pods for as long as API servers wait for them.
func TestTheUninstallWaitsForCalls(t *testing.T) {
	job := objects(t, cluster{version: newest}, values(t, "webhook: {timeoutSeconds: 25}"))["Job eni-guard-free-held"]
	if args := podSpec(t, job).Containers[0].Args; !slices.Contains(args, "--webhook-timeout=25s") {
		t.Errorf("it is called with %v", args)
	}
}

// The agent listens at its node's address, of whichever family that is.
func TestTheAddressesOfTheAgent(t *testing.T) {
	args := podSpec(t, objects(t, cluster{version: newest}, nil)["DaemonSet eni-guard-agent"]).Containers[0].Args
	for _, node := range []string{"127.0.0.1", "::1"} {
		listening := 0
		for _, arg := range args {
			if _, address, is := strings.Cut(arg, "-address="); is {
				host, _, err := net.SplitHostPort(strings.ReplaceAll(address, "$(NODE_IP)", node))
				if listening++; err != nil || host != node && host != "127.0.0.1" {
					t.Errorf("%s on node %s: %q, %v", arg, node, host, err)
				}
			}
		}
		if listening != 3 {
			t.Errorf("it listens at %d addresses", listening)
		}
	}
}

// The agent starts on a node that no pod with a network of its own has been on: only a runtime makes /run/netns. What must be there
// is named when it is not, by the kubelet, and not made.
func TestTheHostPathsOfTheAgent(t *testing.T) {
	types := map[string]corev1.HostPathType{}
	for _, object := range objects(t, cluster{version: newest}, nil) {
		if object.GetKind() != "DaemonSet" {
			continue
		}
		for _, volume := range podSpec(t, object).Volumes {
			if volume.HostPath != nil {
				types[volume.HostPath.Path] = *volume.HostPath.Type
			}
		}
	}
	want := map[string]corev1.HostPathType{
		"/run/netns": corev1.HostPathDirectoryOrCreate, "/sys/fs/cgroup": corev1.HostPathDirectory, "/run/containerd": corev1.HostPathDirectory,
	}
	if !maps.Equal(types, want) {
		t.Errorf("got %v, want %v", types, want)
	}
}

// Neither the guard's own namespace nor an exempt one is ever guarded, and by nothing that asks the webhook.
func TestExemptNamespaces(t *testing.T) {
	made := objects(t, cluster{version: newest}, values(t, "exemptNamespaces: [kube-system, ops]"))
	for _, name := range []string{"ValidatingWebhookConfiguration eni-guard", "ValidatingWebhookConfiguration eni-guard-failing-open"} {
		for _, webhook := range field[[]any](t, made[name], "webhooks") {
			selector, _, err := unstructured.NestedSlice(webhook.(map[string]any), "namespaceSelector", "matchExpressions")
			if err != nil || len(selector) == 0 {
				t.Fatalf("%s has no namespaceSelector (%v)", name, err)
			}
			first := selector[0].(map[string]any)
			if got := first["values"].([]any); first["operator"] != "NotIn" || !slices.Equal(got, []any{"eni-guard", "kube-system", "ops"}) {
				t.Errorf("%s leaves out %v", name, first)
			}
		}
	}
	for text, want := range map[string]int{"exemptNamespaces: []": 1, "exemptNamespaces: [eni-guard]": 1} {
		webhooks := field[[]any](t, objects(t, cluster{version: newest}, values(t, text))["ValidatingWebhookConfiguration eni-guard"], "webhooks")
		selector, _, _ := unstructured.NestedSlice(webhooks[0].(map[string]any), "namespaceSelector", "matchExpressions")
		if got := selector[0].(map[string]any)["values"].([]any); len(got) != want {
			t.Errorf("%s leaves out %v", text, got)
		}
	}
}

// Labels of the user are on every object and every pod, and select nothing.
func TestCommonLabels(t *testing.T) {
	v := maps.Clone(everything)
	v["commonLabels"] = map[string]any{"team": "network"}
	for name, object := range objects(t, cluster{newest, monitoring}, v) {
		if object.GetLabels()["team"] != "network" {
			t.Errorf("%s lacks the label", name)
		}
		if object.GetKind() == "Deployment" || object.GetKind() == "DaemonSet" {
			if field[map[string]any](t, object, "spec", "template", "metadata", "labels")["team"] != "network" {
				t.Errorf("the pods of %s lack the label", name)
			}
			if _, selects := field[map[string]any](t, object, "spec", "selector", "matchLabels")["team"]; selects {
				t.Errorf("%s selects by the label, which can never be changed", name)
			}
		}
	}
}

// Replicas stay apart, also during a rolling update, where the cluster knows how.
func TestReplicasAreSpread(t *testing.T) {
	for version, byHash := range map[string]bool{"1.26.15": false, newest: true} {
		deployment := objects(t, cluster{version: version}, nil)["Deployment eni-guard-webhook"]
		var keys []string
		for _, constraint := range podSpec(t, deployment).TopologySpreadConstraints {
			keys = append(keys, constraint.TopologyKey)
			if constraint.LabelSelector == nil || !selects(t, constraint.LabelSelector.MatchLabels, deployment) {
				t.Errorf("the constraint over %s does not select the replicas", constraint.TopologyKey)
			}
			if (len(constraint.MatchLabelKeys) > 0) != byHash {
				t.Errorf("Kubernetes %s: matchLabelKeys %v", version, constraint.MatchLabelKeys)
			}
		}
		if !slices.Equal(keys, []string{"kubernetes.io/hostname", "topology.kubernetes.io/zone"}) {
			t.Errorf("replicas are spread over %v", keys)
		}
	}
}

// What chooses the webhook's pods by their labels does.
func TestSelectors(t *testing.T) {
	made := objects(t, cluster{newest, monitoring}, everything)
	webhook, agent := made["Deployment eni-guard-webhook"], made["DaemonSet eni-guard-agent"]
	service := made["Service eni-guard-webhook"]
	for _, test := range []struct {
		by     *unstructured.Unstructured
		path   []string
		what   *unstructured.Unstructured
		others *unstructured.Unstructured
	}{
		{made["PodDisruptionBudget eni-guard-webhook"], []string{"spec", "selector", "matchLabels"}, webhook, agent},
		{made["NetworkPolicy eni-guard-webhook"], []string{"spec", "podSelector", "matchLabels"}, webhook, agent},
		{service, []string{"spec", "selector"}, webhook, agent},
		{made["PodMonitor eni-guard-agent"], []string{"spec", "selector", "matchLabels"}, agent, webhook},
	} {
		chosen := map[string]string{}
		for key, value := range field[map[string]any](t, test.by, test.path...) {
			chosen[key] = value.(string)
		}
		if !selects(t, chosen, test.what) || selects(t, chosen, test.others) {
			t.Errorf("%s %s selects %v", test.by.GetKind(), test.by.GetName(), chosen)
		}
	}
	for key, value := range field[map[string]any](t, made["ServiceMonitor eni-guard-webhook"], "spec", "selector", "matchLabels") {
		if service.GetLabels()[key] != value {
			t.Errorf("the ServiceMonitor asks for %s=%s, which the Service has not", key, value)
		}
	}
}

// selects says whether labels select the pods of a workload.
func selects(t *testing.T, chosen map[string]string, workload *unstructured.Unstructured) bool {
	t.Helper()
	pods := labels.Set{}
	for key, value := range field[map[string]any](t, workload, "spec", "template", "metadata", "labels") {
		pods[key] = value.(string)
	}
	return labels.SelectorFromSet(chosen).Matches(pods)
}

// What is generated is what the chart makes now.
func TestGeneratedFilesAreUpToDate(t *testing.T) {
	table, err := valuesTable(repo)
	if err != nil {
		t.Fatal(err)
	}
	if written, err := os.ReadFile(filepath.Join(repo, chartDir, "README.md")); err != nil || string(written) != table {
		t.Errorf("%s/README.md is not what values.yaml says (%v): run `make generate`", chartDir, err)
	}
	files, err := kustomizeBases(repo)
	if err != nil {
		t.Fatal(err)
	}
	written := map[string]string{}
	err = filepath.WalkDir(filepath.Join(repo, configDir), func(name string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		relative, err := filepath.Rel(filepath.Join(repo, configDir), name)
		if err != nil {
			return err
		}
		content, err := os.ReadFile(name)
		written[relative] = string(content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if written[name] != files[name] {
			t.Errorf("config/%s is not what the chart makes: run `make generate`", name)
		}
		delete(written, name)
	}
	for name := range written {
		t.Errorf("config/%s is nothing that the chart makes: run `make generate`", name)
	}
}

// kustomize makes of config/ what Helm makes of the chart, but for Secrets, hooks, and what Helm notes for itself.
func TestKustomizeMakesTheSame(t *testing.T) {
	built := map[string]*unstructured.Unstructured{}
	for _, base := range []string{"default", "network-policy", "prometheus", "grafana"} {
		resources, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), filepath.Join(repo, configDir, base))
		if err != nil {
			t.Fatalf("config/%s: %v", base, err)
		}
		for _, resource := range resources.Resources() {
			content, err := resource.Map()
			if err != nil {
				t.Fatal(err)
			}
			object := &unstructured.Unstructured{Object: content}
			built[object.GetKind()+" "+object.GetName()] = object
		}
	}
	if _, made := built["Namespace eni-guard"]; !made {
		t.Error("config/default makes no namespace")
	}
	delete(built, "Namespace eni-guard")
	made, err := render(repo, cluster{newest, monitoring}, everything)
	if err != nil {
		t.Fatal(err)
	}
	for _, document := range made.objects {
		object := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(document), object); err != nil {
			t.Fatal(err)
		}
		if object.GetKind() == "Secret" {
			continue
		}
		name := object.GetKind() + " " + object.GetName()
		if built[name] == nil {
			t.Errorf("kustomize makes no %s", name)
			continue
		}
		if specOf(t, built[name]) != specOf(t, object) {
			t.Errorf("%s differs:\n%s\n%s", name, specOf(t, built[name]), specOf(t, object))
		}
		delete(built, name)
	}
	for name := range built {
		t.Errorf("kustomize makes %s, and the chart does not", name)
	}
}

// specOf is an object without what differs on purpose.
func specOf(t *testing.T, object *unstructured.Unstructured) string {
	t.Helper()
	content, err := yaml.Marshal(object.Object)
	if err != nil {
		t.Fatal(err)
	}
	return helmLines.ReplaceAllString(string(content), "")
}
