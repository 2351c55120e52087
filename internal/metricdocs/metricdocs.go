// Package metricdocs compares what a program tells Prometheus with what docs/metrics.md says that it does. It is for tests.
package metricdocs

import (
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// prefix is that of the guard's own metrics; others come from libraries, and are documented there.
const prefix = "eni_guard_"

// Table is what docs/metrics.md must say about a program. A vector of metrics must have a series, or it is missing.
func Table(gatherer prometheus.Gatherer) (string, error) {
	families, err := gatherer.Gather()
	if err != nil {
		return "", err
	}
	var out strings.Builder
	out.WriteString("| metric | type | what it is |\n|---|---|---|\n")
	for _, family := range families {
		if !strings.HasPrefix(family.GetName(), prefix) {
			continue
		}
		var labels []string
		for _, label := range family.GetMetric()[0].GetLabel() {
			labels = append(labels, label.GetName())
		}
		slices.Sort(labels)
		name := family.GetName()
		if len(labels) > 0 {
			name += "{" + strings.Join(labels, ",") + "}"
		}
		fmt.Fprintf(&out, "| `%s` | %s | %s |\n", name, strings.ToLower(family.GetType().String()), family.GetHelp())
	}
	return out.String(), nil
}

// Compare says what is wrong with the section about a program in the file that documents the metrics.
func Compare(file, heading string, gatherer prometheus.Gatherer) error {
	content, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	_, section, found := strings.Cut(string(content), "\n## "+heading+"\n")
	if !found {
		return fmt.Errorf("%s has no section %q", file, heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	table, err := Table(gatherer)
	if err != nil {
		return err
	}
	if !strings.Contains(section, table) {
		return fmt.Errorf("%s, section %q, is not what the program tells Prometheus. It must be:\n%s", file, heading, table)
	}
	return nil
}
