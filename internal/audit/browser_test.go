package audit

import (
	"bytes"
	"image"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// browse opens a page in a real browser that has no network, and returns what that prints.
func browse(t *testing.T, page string, args ...string) string {
	t.Helper()
	browser, err := exec.LookPath("chromium")
	if err != nil {
		t.Fatal("chromium is missing; `make test-unit` installs it on Debian")
	}
	// Without a sandbox it runs as root, too. It shows one file, which the test has made.
	args = append([]string{"--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--user-data-dir=" + t.TempDir(),
		"--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1400,4000", "--virtual-time-budget=2000"}, args...)
	cmd := exec.CommandContext(t.Context(), browser, append(args, "file://"+page)...)
	var messages bytes.Buffer
	cmd.Stderr = &messages
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, messages.String())
	}
	return string(out)
}

// pageOf writes the page of a recorded log.
func pageOf(t *testing.T, log string) (file, content string) {
	t.Helper()
	content, status, err := run(t, "", "-o", "html", log)
	if status != 0 {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), "review.html")
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return file, content
}

func TestThePageInABrowser(t *testing.T) {
	file, content := pageOf(t, scenarios)
	d := documentOf(t, scenarios)
	if address := regexp.MustCompile(`(?i)https?:|<script|<link|<img|url\(|@import`).FindString(content); address != "" {
		t.Errorf("the page needs something else: %s", address)
	}

	dom := browse(t, file, "--dump-dom")
	_, table, _ := strings.Cut(dom, `<table id="removals">`)
	if rows := strings.Count(table, "<tr>") - 1; rows != len(d.Removals) {
		t.Errorf("the browser shows %d rows of %d removals", rows, len(d.Removals))
	}
	for _, c := range d.Totals.Decisions {
		if !strings.Contains(dom, `<circle`) || !strings.Contains(dom, `<g class="`+c.Name+`">`) {
			t.Errorf("the time line does not have %s", c.Name)
		}
	}

	// What is on the picture: a dot and a tag in the colour of every decision.
	shot := filepath.Join(t.TempDir(), "page.png")
	browse(t, file, "--screenshot="+shot)
	picture := colours(t, shot)
	for name, colour := range map[string]uint32{"slipped-past": 0xb3261e, "overridden": 0xc4561b, "audited": 0xb58900, "unanswered": 0x7b5ea7, "denied": 0x1f6fb2, "held": 0x2a8f8f, "allowed": 0x3c8b40, "exempt": 0x777777} {
		if picture[colour] < 200 {
			t.Errorf("%d pixels have the colour of %s", picture[colour], name)
		}
	}

	print := filepath.Join(t.TempDir(), "page.pdf")
	browse(t, file, "--no-pdf-header-footer", "--print-to-pdf="+print)
	pdf, err := os.ReadFile(print)
	if err != nil {
		t.Fatal(err)
	}
	// A4 on its side is 842 by 595 points.
	boxes := regexp.MustCompile(`/MediaBox \[0 0 ([0-9.]+) ([0-9.]+)\]`).FindAllSubmatch(pdf, -1)
	if len(boxes) < 2 {
		t.Fatalf("%d pages are printed", len(boxes))
	}
	for _, box := range boxes {
		if width, height := string(box[1]), string(box[2]); !strings.HasPrefix(width, "84") || !strings.HasPrefix(height, "59") {
			t.Errorf("a page of %s by %s points", width, height)
		}
	}
}

// On a telephone a table of ten columns would be cut off behind the second.
func TestThePageOnANarrowScreen(t *testing.T) {
	file, _ := pageOf(t, everyWay)
	shot := filepath.Join(t.TempDir(), "page.png")
	browse(t, file, "--window-size=500,12000", "--screenshot="+shot)
	picture := colours(t, shot)
	// The tags of the table, which its ninth column has; beside them, a total has the colour on its edge, and the time line has dots.
	for name, colour := range map[string]uint32{"audited": 0xb58900, "slipped-past": 0xb3261e, "denied": 0x1f6fb2} {
		if picture[colour] < 1500 {
			t.Errorf("%d pixels have the colour of %s: its tags do not show", picture[colour], name)
		}
	}
}

// colours counts the pixels of a picture by their colour.
func colours(t *testing.T, file string) map[uint32]int {
	t.Helper()
	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var picture image.Image
	if picture, err = png.Decode(bytes.NewReader(content)); err != nil {
		t.Fatal(err)
	}
	counts := map[uint32]int{}
	for y := range picture.Bounds().Dy() {
		for x := range picture.Bounds().Dx() {
			r, g, b, _ := picture.At(x, y).RGBA()
			counts[r>>8<<16|g&0xff00|b>>8]++
		}
	}
	return counts
}
