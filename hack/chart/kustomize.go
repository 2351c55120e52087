package main

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// configDir is where the kustomize bases are in the checkout.
const configDir = "config"

// newest is the Kubernetes for which the bases are made; they need 1.30, the first with stable matchConditions.
const newest = "1.36.3"

// monitoring are the kinds of the Prometheus operator that the chart knows.
var monitoring = []string{
	"monitoring.coreos.com/v1/ServiceMonitor", "monitoring.coreos.com/v1/PodMonitor", "monitoring.coreos.com/v1/PrometheusRule",
}

// everything switches on what the chart leaves out by default.
var everything = map[string]any{
	"webhook":    map[string]any{"networkPolicy": map[string]any{"enabled": true}},
	"prometheus": map[string]any{"serviceMonitor": enabled, "podMonitor": enabled, "rule": enabled},
	"grafana":    map[string]any{"dashboard": enabled},
}

var enabled = map[string]any{"enabled": true}

// bases are the directories of config/ that config/default puts together; the others are for those who want them.
var bases = []string{"rbac", "webhook", "manager", "agent"}

// baseOf says in which directory of config/, as kubebuilder lays them out, an object belongs.
func baseOf(kind, name string) string {
	switch kind {
	case "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding":
		return "rbac"
	case "ValidatingWebhookConfiguration", "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding", "Service":
		return "webhook"
	case "NetworkPolicy":
		return "network-policy"
	case "ServiceMonitor", "PodMonitor", "PrometheusRule":
		return "prometheus"
	case "ConfigMap":
		if strings.HasSuffix(name, "-dashboard") {
			return "grafana"
		}
	case "DaemonSet":
		return "agent"
	}
	return "manager"
}

// helmLines are lines of objects that only Helm needs, or that only Helm can fill.
var helmLines = regexp.MustCompile(`(?m)^ *(helm\.sh/chart: .*|app\.kubernetes\.io/managed-by: Helm|# Source: .*|caBundle: .*)\n`)

// kustomizeBases returns the files of config/ by their paths in it.
func kustomizeBases(repo string) (map[string]string, error) {
	made, err := render(repo, cluster{newest, monitoring}, everything)
	if err != nil {
		return nil, err
	}
	files := map[string]string{"manager/namespace.yaml": namespaceFile}
	resources := map[string][]string{"manager": {"namespace.yaml"}}
	for _, document := range made.objects {
		var object struct {
			Kind     string
			Metadata struct{ Name string }
		}
		if err := yaml.Unmarshal([]byte(document), &object); err != nil {
			return nil, err
		}
		if object.Kind == "Secret" {
			continue // what is in it is made anew at each rendering
		}
		base := baseOf(object.Kind, object.Metadata.Name)
		file := strings.ToLower(object.Kind) + "-" + strings.TrimPrefix(object.Metadata.Name, release+"-") + ".yaml"
		files[path.Join(base, file)] = helmLines.ReplaceAllString(document, "")
		resources[base] = append(resources[base], file)
	}
	for base, names := range resources {
		files[path.Join(base, "kustomization.yaml")] = kustomization(names)
	}
	above := slices.Clone(bases)
	for i := range above {
		above[i] = "../" + above[i]
	}
	files["default/kustomization.yaml"] = kustomization(above) + `# To pull the image from elsewhere, by a kustomization of your own: kustomize edit set image eni-guard.io/eni-guard=REGISTRY/eni-guard:TAG
`
	return files, nil
}

const namespaceFile = `apiVersion: v1
kind: Namespace
metadata:
  name: eni-guard
  labels:
    # Agents look at the processes and the network of their node.
    pod-security.kubernetes.io/enforce: privileged
`

func kustomization(resources []string) string {
	slices.Sort(resources)
	return fmt.Sprintf("# Written by `make generate` from the chart.\napiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\nresources:\n- %s\n",
		strings.Join(resources, "\n- "))
}

// writeFiles makes dir hold these files and no others.
func writeFiles(dir string, files map[string]string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	for name, content := range files {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}
