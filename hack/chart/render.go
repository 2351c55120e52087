package main

import (
	"fmt"
	"path/filepath"
	"regexp"
	"strings"

	"helm.sh/helm/v4/pkg/action"
	"helm.sh/helm/v4/pkg/chart/common"
	"helm.sh/helm/v4/pkg/chart/v2/loader"
	releasev1 "helm.sh/helm/v4/pkg/release/v1"
)

// chartDir is where the chart is in the checkout.
const chartDir = "charts/eni-guard"

// release is what the chart is called where nothing else says so, and its namespace: what README.md installs.
const release = "eni-guard"

// cluster is what a chart may ask about a cluster.
type cluster struct {
	// version is that of Kubernetes, without a v.
	version string
	// apis are kinds beyond those of Kubernetes itself, GROUP/VERSION/KIND.
	apis []string
}

// rendered is what the chart makes of values.
type rendered struct {
	// objects are YAML documents, with the comments of the templates.
	objects []string
	// hooks are those that Helm does not install with the others.
	hooks []string
	notes string
}

// render does what `helm template` does, as the release eni-guard in the namespace eni-guard. Its errors are Helm's.
func render(repo string, c cluster, values map[string]any) (rendered, error) {
	chart, err := loader.Load(filepath.Join(repo, chartDir))
	if err != nil {
		return rendered{}, err
	}
	version, err := common.ParseKubeVersion(c.version)
	if err != nil {
		return rendered{}, err
	}
	install := action.NewInstall(action.NewConfiguration())
	install.DryRunStrategy = action.DryRunClient
	install.ReleaseName, install.Namespace = release, release
	install.KubeVersion, install.APIVersions = version, c.apis
	made, err := install.Run(chart, values)
	if err != nil {
		return rendered{}, err
	}
	r, is := made.(*releasev1.Release)
	if !is {
		return rendered{}, fmt.Errorf("helm has made a %T", made)
	}
	result := rendered{objects: documents(r.Manifest), notes: r.Info.Notes}
	for _, hook := range r.Hooks {
		result.hooks = append(result.hooks, hook.Manifest)
	}
	return result, nil
}

var separator = regexp.MustCompile(`(?m)^---\n`)

// documents splits what Helm has rendered, and leaves out what has comments alone.
func documents(manifest string) []string {
	var found []string
	for _, document := range separator.Split(manifest, -1) {
		if strings.Contains("\n"+document, "\nkind: ") {
			found = append(found, document)
		}
	}
	return found
}
