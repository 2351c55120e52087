package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sigs.k8s.io/structured-merge-diff/v6/typed"
)

// oldest is the Kubernetes that the chart says it needs at least.
const oldest = "1.25.16"

// What is made for the oldest Kubernetes has no field that it does not know: Helm could not install that. Those from 1.30 on are
// asked themselves (webhook/conformance_chart_test.go).
func TestTheOldestKubernetesKnowsEveryField(t *testing.T) {
	types := kubernetesTypes(t, "v0.25.16", "h1:Lf8gd4vP9hR2sDuSU+9id9Mj23u8X58nESZ5m1JcI24=")
	checked := 0
	for name, object := range objects(t, cluster{oldest, monitoring}, everything) {
		kind := object.GroupVersionKind()
		if kind.Group == "monitoring.coreos.com" {
			continue
		}
		group, _, _ := strings.Cut(kind.Group, ".")
		if group == "" {
			group = "core"
		}
		if _, err := types.Type(fmt.Sprintf("io.k8s.api.%s.%s.%s", group, kind.Version, kind.Kind)).FromUnstructured(object.Object); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		checked++
	}
	if checked < 20 {
		t.Errorf("only %d objects were looked at", checked)
	}
}

// kubernetesTypes returns the types of a version of Kubernetes, by which its API servers judge what is applied. Its client library has
// them; the module is not linked, only read.
func kubernetesTypes(t *testing.T, version, sum string) *typed.Parser {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "mod", "download", "-json", "k8s.io/client-go@"+version).Output()
	var downloaded struct{ Dir, Sum, Error string }
	if err = errors.Join(err, json.Unmarshal(out, &downloaded)); err != nil || downloaded.Sum != sum {
		t.Fatalf("downloading k8s.io/client-go %s: %v %s, checksum %s", version, err, downloaded.Error, downloaded.Sum)
	}
	source, err := os.ReadFile(filepath.Join(downloaded.Dir, "applyconfigurations/internal/internal.go"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(source), "var schemaYAML = typed.YAMLObject(`")
	schema, _, found := strings.Cut(rest, "`)")
	if !found {
		t.Fatal("k8s.io/client-go has no schemaYAML")
	}
	parser, err := typed.NewParser(typed.YAMLObject(schema))
	if err != nil {
		t.Fatal(err)
	}
	return parser
}
