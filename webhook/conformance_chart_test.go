//go:build conformance

package webhook

import (
	"os"
	"path/filepath"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/restmapper"
)

// TestChartIsValid has the API server look at all that the chart and config/ make, as if it were created, and takes no field
// that it does not know.
func TestChartIsValid(t *testing.T) {
	s := startAPIServer(t)
	documents := templateChart(t, s.version)
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
		taken++
	}
	t.Logf("Kubernetes %s takes %d objects", s.version, taken)
}
