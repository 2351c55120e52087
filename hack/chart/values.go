package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// value is one line of the table of values.
type value struct {
	path, preset, description string
}

// valuesTable writes the chart's README: its values, from the comments of values.yaml.
func valuesTable(repo string) (string, error) {
	content, err := os.ReadFile(filepath.Join(repo, chartDir, "values.yaml"))
	if err != nil {
		return "", err
	}
	values, err := listValues(content)
	if err != nil {
		return "", fmt.Errorf("%s/values.yaml: %w", chartDir, err)
	}
	var out strings.Builder
	out.WriteString(`<!-- Written by ` + "`make generate`" + ` from values.yaml. -->
# The chart eni-guard

How to install it is in [the README of the repository](../../README.md#install), what it costs and how it works in
[docs/design.md](../../docs/design.md). Agents need a namespace that allows privileged pods: where Pod Security is enforced, label it
` + "`pod-security.kubernetes.io/enforce=privileged`" + `. A wrong value is refused before anything is installed, and named by its path.
Inside of what Kubernetes itself defines, such as an affinity or a toleration, it is the API server that refuses it, in the middle of the
installation: correct it, and repeat the same as ` + "`helm upgrade --install`" + `.

To upgrade to another version of the chart, use ` + "`--reset-then-reuse-values`" + `: with ` + "`--reuse-values`" + ` Helm leaves out the values that are new
in it, and the schema says which are missing.

To apply what ` + "`helm template`" + ` renders, render it with ` + "`--no-hooks`" + `. Otherwise the Job that Helm runs before it uninstalls the guard is
applied with it, runs at once, and switches the guard off: it deletes the webhook configurations.

| value | default | what it is |
|---|---|---|
`)
	for _, v := range values {
		fmt.Fprintf(&out, "| `%s` | `%s` | %s |\n", v.path, v.preset, strings.ReplaceAll(v.description, "|", `\|`))
	}
	return out.String(), nil
}

// listValues returns the values that have a comment of their own, in their order. It fails where a value has none, and no value
// above it has one that speaks for it.
func listValues(content []byte) ([]value, error) {
	var document yaml.Node
	if err := yaml.Unmarshal(content, &document); err != nil {
		return nil, err
	}
	return valuesBelow("", document.Content[0])
}

func valuesBelow(prefix string, mapping *yaml.Node) ([]value, error) {
	var found []value
	for i := 0; i+1 < len(mapping.Content); i += 2 {
		key, node := mapping.Content[i], mapping.Content[i+1]
		path := prefix + key.Value
		if node.Kind == yaml.MappingNode && commented(node) {
			below, err := valuesBelow(path+".", node)
			if err != nil {
				return nil, err
			}
			found = append(found, below...)
			continue
		}
		if key.HeadComment == "" {
			return nil, fmt.Errorf("%s has no comment that says what it is", path)
		}
		var preset any
		if err := node.Decode(&preset); err != nil {
			return nil, err
		}
		text, err := json.Marshal(preset)
		if err != nil {
			return nil, err
		}
		found = append(found, value{path, string(text), comment(key.HeadComment)})
	}
	return found, nil
}

// commented says whether the values of a mapping are explained one by one.
func commented(node *yaml.Node) bool {
	return slices.ContainsFunc(node.Content, func(below *yaml.Node) bool { return below.HeadComment != "" || commented(below) })
}

// comment is the text of a comment, in one line; only what follows the last empty line belongs to the value.
func comment(text string) string {
	paragraphs := strings.Split(text, "\n\n")
	lines := strings.Split(paragraphs[len(paragraphs)-1], "\n")
	for i, line := range lines {
		lines[i] = strings.TrimPrefix(strings.TrimPrefix(line, "#"), " ")
	}
	return strings.Join(lines, " ")
}
