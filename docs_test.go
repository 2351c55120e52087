package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/util/yaml"
)

// documents returns the Markdown of the repository, by its path.
func documents(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() && path != "." && (strings.HasPrefix(entry.Name(), ".") || entry.Name() == "bin" || entry.Name() == "dist") {
			return filepath.SkipDir
		}
		if filepath.Ext(path) == ".md" {
			content, err := os.ReadFile(path)
			found[path] = string(content)
			return err
		}
		return nil
	})
	if err != nil || len(found) < 8 {
		t.Fatalf("%d documents (%v)", len(found), err)
	}
	return found
}

// Every link from one document to another, and to a section of it, leads somewhere.
func TestTheLinksOfTheDocuments(t *testing.T) {
	all := documents(t)
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	for path, content := range all {
		for _, match := range link.FindAllStringSubmatch(content, -1) {
			target := match[1]
			if strings.Contains(target, "://") {
				continue
			}
			file, anchor, _ := strings.Cut(target, "#")
			if file == "" {
				file = filepath.Base(path)
			}
			file = filepath.Join(filepath.Dir(path), file)
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s: the link %s leads nowhere", path, target)
			}
			if anchor != "" && !slices.Contains(anchors(all[file]), anchor) {
				t.Errorf("%s: %s has no section #%s", path, file, anchor)
			}
		}
	}
}

// anchors returns the names that GitHub gives to the sections of a document.
func anchors(document string) []string {
	var names []string
	heading := regexp.MustCompile(`(?m)^#+ (.*)$`)
	dropped := regexp.MustCompile(`[^\p{L}\p{N} _-]`)
	for _, match := range heading.FindAllStringSubmatch(document, -1) {
		name := dropped.ReplaceAllString(strings.ToLower(match[1]), "")
		names = append(names, strings.ReplaceAll(name, " ", "-"))
	}
	return names
}

// The README in Chinese shows no command that the other one does not, and lacks none.
func TestBothReadmesShowTheSameCommands(t *testing.T) {
	all := documents(t)
	console := regexp.MustCompile("(?s)```console\n(.*?)```")
	blocks := func(path string) string {
		var commands []string
		for _, match := range console.FindAllStringSubmatch(all[path], -1) {
			commands = append(commands, match[1])
		}
		return strings.Join(commands, fmt.Sprintln("--"))
	}
	if english, chinese := blocks("README.md"), blocks("README.zh-CN.md"); english != chinese || english == "" {
		t.Errorf("the commands of README.md:\n%s\nthose of README.zh-CN.md:\n%s", english, chinese)
	}
}

// The audit policy that people are to use is the one that the test cluster runs with, which the end-to-end tests review.
func TestTheAuditPolicyIsTheTestClusters(t *testing.T) {
	manifest, err := os.ReadFile("hack/cluster/manifests/audit-policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	_, policy, found := strings.Cut(string(manifest), "\napiVersion:")
	if !found || !strings.Contains(documents(t)["docs/audit.md"], "```yaml\napiVersion:"+policy+"```") {
		t.Error("docs/audit.md does not have the audit policy of hack/cluster/manifests/audit-policy.yaml")
	}
}

// A `make` in a document names a target, and variables, that the Makefile has.
func TestTheTargetsInTheDocuments(t *testing.T) {
	makefile, err := os.ReadFile("Makefile")
	if err != nil {
		t.Fatal(err)
	}
	// In prose, something may make something else: so only what is shown as code.
	block := regexp.MustCompile("(?ms)^ *```[a-z]*\n(.*?)```")
	command := regexp.MustCompile("(?m)(?:`|^ *)make ([a-z0-9-]+)((?: [A-Z_]+=[^ `\n]+)*)")
	prose := regexp.MustCompile("(?m)^ *make ")
	found := 0
	for path, content := range documents(t) {
		code := prose.ReplaceAllString(block.ReplaceAllString(content, ""), "")
		for _, match := range block.FindAllStringSubmatch(content, -1) {
			code += "\n" + match[1]
		}
		for _, match := range command.FindAllStringSubmatch(code, -1) {
			found++
			if !regexp.MustCompile("(?m)^" + match[1] + ":").Match(makefile) {
				t.Errorf("%s: the Makefile has no target %s", path, match[1])
			}
			for variable := range strings.FieldsSeq(match[2]) {
				name, _, _ := strings.Cut(variable, "=")
				if !regexp.MustCompile("(?m)^" + name + ` *\?=`).Match(makefile) {
					t.Errorf("%s: the Makefile has no variable %s to set", path, name)
				}
			}
		}
	}
	if found < 20 {
		t.Errorf("only %d targets were found; or this test cannot find them any more", found)
	}
}

// What a document names as a value of the chart, or sets, is one.
func TestTheValuesInTheDocuments(t *testing.T) {
	content, err := os.ReadFile("charts/eni-guard/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var values map[string]any
	if err := yaml.Unmarshal(content, &values); err != nil {
		t.Fatal(err)
	}
	has := func(path string) bool {
		var at any = values
		for key := range strings.SplitSeq(path, ".") {
			below, _ := at.(map[string]any)
			value, there := below[key]
			if !there {
				return false
			}
			at = value
		}
		return true
	}
	set := regexp.MustCompile(`--set(?:-string)?[ =]([A-Za-z.]+)=`)
	named := regexp.MustCompile("`([a-zA-Z]+(?:\\.[a-zA-Z]+)+)(?:[:=] ?[^`]*)?`")
	found := 0
	for path, content := range documents(t) {
		names := set.FindAllStringSubmatch(content, -1)
		for _, match := range named.FindAllStringSubmatch(content, -1) {
			// Files and fields of others have dots too.
			if top, below, _ := strings.Cut(match[1], "."); has(top) && below != "go" && below != "json" {
				names = append(names, match)
			}
		}
		for _, match := range names {
			found++
			if !has(match[1]) {
				t.Errorf("%s: the chart has no value %s", path, match[1])
			}
		}
	}
	if found < 70 {
		t.Errorf("only %d values were found; or this test cannot find them any more", found)
	}
}
