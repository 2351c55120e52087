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
			cells := strings.Split(strings.TrimSpace(line), " | ")
			if len(cells) != 5 {
				t.Fatalf("a row of %d cells: %s", len(cells), line)
			}
			// What is no link would not be looked at.
			proof := strings.TrimSuffix(cells[4], " |")
			if len(links) == 0 || link.ReplaceAllString(proof, "") != strings.Repeat(", ", len(links)-1) {
				t.Errorf("not a list of links to tests: %s", proof)
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
