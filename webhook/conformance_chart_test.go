//go:build conformance

package webhook

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/restmapper"
	"sigs.k8s.io/controller-runtime/pkg/envtest"
)

// TestChartIsValid has the API server look at all that the chart and config/ make, as if it were created, and takes no field
// that it does not know.
func TestChartIsValid(t *testing.T) {
	s := startAPIServer(t)
	documents := append(templateChart(t, s.version), templateChart(t, s.version, certManager(t, s)...)...)
	files, err := filepath.Glob("../config/*/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no kustomize bases: %v", err)
	}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		documents = append(documents, content)
	}
	for _, name := range []string{"eni-guard", "eni-guard-test"} {
		_, err := s.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	made := map[string]int{}
	groups, err := restmapper.GetAPIGroupResources(s.Discovery())
	if err != nil {
		t.Fatal(err)
	}
	mapper := restmapper.NewDiscoveryRESTMapper(groups)
	api, err := dynamic.NewForConfig(s.config)
	if err != nil {
		t.Fatal(err)
	}
	taken := 0
	for _, document := range documents {
		object := &unstructured.Unstructured{}
		if err := yaml.Unmarshal(document, &object.Object); err != nil {
			t.Fatalf("%v\n%s", err, document)
		}
		switch kind := object.GroupVersionKind(); {
		case kind.Kind == "Kustomization", kind.Group == "monitoring.coreos.com":
			continue // none that this API server knows
		case kind.Kind == "Namespace":
			object.SetName(object.GetName() + "-new")
		}
		mapping, err := mapper.RESTMapping(object.GroupVersionKind().GroupKind(), object.GroupVersionKind().Version)
		if err != nil {
			t.Errorf("Kubernetes %s: %v", s.version, err)
			continue
		}
		resource := api.Resource(mapping.Resource)
		var into dynamic.ResourceInterface = resource
		if namespace := object.GetNamespace(); namespace != "" {
			into = resource.Namespace(namespace)
		}
		_, err = into.Create(t.Context(), object, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}, FieldValidation: metav1.FieldValidationStrict})
		if err != nil {
			t.Errorf("Kubernetes %s: %s %s: %v", s.version, object.GetKind(), object.GetName(), err)
		}
		made[object.GetKind()]++
		taken++
	}
	t.Logf("Kubernetes %s takes %d objects", s.version, taken)
	if made["Certificate"] != 4 || made["Issuer"] != 2 {
		t.Errorf("of cert-manager's kinds it has seen %d Certificates and %d Issuers", made["Certificate"], made["Issuer"])
	}
}

// certManager gives the API server the kinds of cert-manager, and returns what has Helm use them. The module is not linked: only its
// CRDs are read.
func certManager(t *testing.T, s *apiServer) []string {
	t.Helper()
	const module, sum = "github.com/cert-manager/cert-manager@v1.21.2", "h1:UWgoYM+KLNtRlqmoWOKjKBOBUPVHeepQ6/ac3ERJW68="
	out, err := exec.CommandContext(t.Context(), "go", "mod", "download", "-json", module).Output()
	var downloaded struct{ Dir, Sum, Error string }
	if err = errors.Join(err, json.Unmarshal(out, &downloaded)); err != nil {
		t.Fatalf("downloading %s: %v %s", module, err, downloaded.Error)
	}
	if downloaded.Sum != sum {
		t.Fatalf("%s has the checksum %s, not %s", module, downloaded.Sum, sum)
	}
	var paths []string
	for _, kind := range []string{"certificates", "issuers"} {
		paths = append(paths, filepath.Join(downloaded.Dir, "deploy/crds/cert-manager.io_"+kind+".yaml"))
	}
	if _, err := envtest.InstallCRDs(s.config, envtest.CRDInstallOptions{Paths: paths, ErrorIfPathMissing: true}); err != nil {
		t.Fatal(err)
	}
	return []string{"--set", "certManager.enabled=true", "--api-versions", "cert-manager.io/v1/Certificate"}
}
