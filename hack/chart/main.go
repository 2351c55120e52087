// Command chart writes what follows from the Helm chart: its table of values and the kustomize bases. Its tests hold the chart
// against what it promises.
package main

import (
	"fmt"
	"os"
	"path/filepath"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: chart CHECKOUT")
		os.Exit(2)
	}
	if err := generate(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "chart: "+err.Error())
		os.Exit(1)
	}
}

func generate(repo string) error {
	table, err := valuesTable(repo)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(repo, chartDir, "README.md"), []byte(table), 0o644); err != nil {
		return err
	}
	files, err := kustomizeBases(repo)
	if err != nil {
		return err
	}
	return writeFiles(filepath.Join(repo, configDir), files)
}
