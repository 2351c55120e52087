package webhook

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// docs/ways-in.md claims that each row is proven by a test: those tests must exist, in the files that it links.
func TestEveryTestInTheTableOfWaysInExists(t *testing.T) {
	const doc = "../docs/ways-in.md"
	text, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	link := regexp.MustCompile(`\[(Test\w+)\]\(([^)]+)\)`)
	tests := map[string]map[string]bool{}
	rows := 0
	for line := range strings.Lines(string(text)) {
		links := link.FindAllStringSubmatch(line, -1)
		if strings.HasPrefix(line, "|") && !strings.HasPrefix(line, "|---") && !strings.Contains(line, "| tests |") {
			rows++
			if len(links) == 0 {
				t.Errorf("a row without a test: %s", line)
			}
			if cells := strings.Count(line, "|"); cells != 6 {
				t.Errorf("a row of %d cells: %s", cells-1, line)
			}
		}
		for _, match := range links {
			name, file := match[1], filepath.Join(filepath.Dir(doc), match[2])
			if tests[file] == nil {
				tests[file] = testsIn(t, file)
			}
			if !tests[file][name] {
				t.Errorf("there is no %s in %s", name, file)
			}
		}
	}
	if rows < 50 {
		t.Errorf("the table has only %d rows; or this test cannot read it any more", rows)
	}
}

// testsIn names the tests of a file.
func testsIn(t *testing.T, file string) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Error(err)
		return names
	}
	for _, declaration := range parsed.Decls {
		if function, ok := declaration.(*ast.FuncDecl); ok && function.Recv == nil {
			names[function.Name.Name] = true
		}
	}
	return names
}
