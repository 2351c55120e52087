package auditlog

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

// removal is an event as the API server writes it, shortened.
func removal(id string) string {
	return `{"kind":"Event","apiVersion":"audit.k8s.io/v1","level":"Request","auditID":"` + id + `","stage":"ResponseComplete",` +
		`"requestURI":"/api/v1/namespaces/shop/pods/web-0","verb":"delete","user":{"username":"jo"},"sourceIPs":["10.0.0.9"],` +
		`"objectRef":{"resource":"pods","namespace":"shop","name":"web-0","apiVersion":"v1"},"responseStatus":{"metadata":{},"code":200},` +
		`"requestReceivedTimestamp":"2026-11-25T01:02:03.000004Z","stageTimestamp":"2026-11-25T01:02:03.100000Z"}`
}

const lookup = `{"kind":"Event","apiVersion":"audit.k8s.io/v1","level":"Metadata","auditID":"x","stage":"ResponseComplete",` +
	`"requestURI":"/api/v1/pods","verb":"list","user":{"username":"jo"},"objectRef":{"resource":"pods","apiVersion":"v1"},` +
	`"requestReceivedTimestamp":"2026-11-25T01:02:03.000004Z","stageTimestamp":"2026-11-25T01:02:03.100000Z"}`

// columns is an event as the log service of Alibaba Cloud exports it: nested fields are texts.
func columns(t *testing.T, event string) string {
	t.Helper()
	var fields map[string]json.RawMessage
	if err := json.Unmarshal([]byte(event), &fields); err != nil {
		t.Fatal(err)
	}
	texts := map[string]string{"__topic__": "", "__source__": "10.0.0.1", "__time__": "1764032523"}
	for key, value := range fields {
		texts[key] = strings.Trim(string(value), `"`)
		if value[0] == '{' || value[0] == '[' {
			texts[key] = string(value)
		}
	}
	out, err := json.Marshal(texts)
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func spaced(t *testing.T, event string) string {
	t.Helper()
	var out bytes.Buffer
	if err := json.Indent(&out, []byte(event), "", " "); err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(out.String(), "\n", " ")
}

func indented(t *testing.T, event string) string {
	t.Helper()
	var out bytes.Buffer
	if err := json.Indent(&out, []byte(event), "", "  "); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// klog is how a line of the API server's own log begins.
const klog = "I1125 01:02:03.000004       1 handler.go:12] "

// cri is a line as a container runtime keeps it.
func cri(head, text string) string {
	return "2026-11-25T01:02:03.000000004Z " + head + " " + text + "\n"
}

func packed(t *testing.T, text string, writer func(io.Writer) io.WriteCloser) string {
	t.Helper()
	var out bytes.Buffer
	w := writer(&out)
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func gzipped(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }

func zstandard(w io.Writer) io.WriteCloser {
	encoder, _ := zstd.NewWriter(w)
	return encoder
}

// readAll reads files and returns the audit IDs of what was handed over.
func readAll(t *testing.T, r *Reader, names []string, stdin string) ([]string, Summary, error) {
	t.Helper()
	sources, err := Sources(names, strings.NewReader(stdin))
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	r.Selection = Selection{GuardNamespace: "eni-guard"}
	r.Each = func(e *Event) {
		if e.Verb != "delete" || e.User.Username != "jo" || e.ObjectRef.Name != "web-0" || e.ResponseStatus.Code != 200 || e.Received.Year() != 2026 || e.SourceIPs[0] != "10.0.0.9" {
			t.Errorf("an event was read as %+v", e)
		}
		ids = append(ids, e.AuditID)
	}
	summary, err := r.Read(t.Context(), sources)
	slices.Sort(ids)
	return ids, summary, err
}

func TestFormats(t *testing.T) {
	two := removal("1") + "\n" + lookup + "\n" + removal("2") + "\n"
	for name, content := range map[string]string{
		"lines":                    two,
		"no end of the last line":  strings.TrimSuffix(two, "\n"),
		"ends of lines of Windows": strings.ReplaceAll(two, "\n", "\r\n"),
		"empty lines":              "\n" + strings.ReplaceAll(two, "\n", "\n\n"),
		"spaces":                   spaced(t, removal("1")) + "\n" + spaced(t, lookup) + "\n" + spaced(t, removal("2")) + "\n",
		"EventList": `{"kind":"EventList","apiVersion":"audit.k8s.io/v1","metadata":{},"items":[` +
			strings.ReplaceAll(removal("1")+","+lookup+","+removal("2"), `"kind":"Event","apiVersion":"audit.k8s.io/v1",`, "") + "]}",
		"columns of the log service": columns(t, removal("1")) + "\n" + columns(t, lookup) + "\n" + columns(t, removal("2")) + "\n",
		"content of the log service": fmt.Sprintf(`{"__time__":1,"content":%q}`+"\n"+`{"__time__":2,"content":%q}`, removal("1"), removal("2")),
		"content behind a prefix":    fmt.Sprintf(`{"__time__":1,"content":%q}`+"\n"+`{"__time__":2,"content":%q}`, klog+removal("1"), " "+removal("2")),
		"a list on one line":         "[" + removal("1") + "," + lookup + "," + removal("2") + "]",
		"a list on several lines":    "[\n" + removal("1") + ",\n" + lookup + ",\n" + removal("2") + "\n]\n",
		"a list for people":          "[\n" + indented(t, removal("1")) + ",\n" + indented(t, removal("2")) + "\n]\n",
		"brackets in texts":          "[" + strings.Replace(removal("1"), `"sourceIPs"`, `"userAgent":"a\\\"}]{[\\\\","sourceIPs"`, 1) + "," + removal("2") + "]",
		"printed for people":         indented(t, removal("1")) + "\n" + indented(t, lookup) + "\n" + indented(t, removal("2")) + "\n",
		"a byte order mark":          "\xef\xbb\xbf" + two,
		"by a container runtime":     cri("stdout F", removal("1")) + cri("stderr F", klog+"ready") + cri("stdout F", lookup) + cri("stdout F", removal("2")),
		"taken apart by a container runtime": cri("stdout P", removal("1")[:50]) + cri("stderr P", klog+"half") + cri("stdout P", removal("1")[50:90]) + cri("stderr F", " a line") +
			cri("stdout F", removal("1")[90:]) + cri("stdout F", removal("2")),
		"by Docker":                 fmt.Sprintf(`{"log":%q,"stream":"stdout"}`+"\n"+`{"log":%q,"stream":"stderr"}`+"\n"+`{"log":%q}`, removal("1")+"\n", klog+"ready\n", removal("2")+"\n"),
		"kubectl logs --timestamps": "2026-11-25T01:02:03.4Z " + removal("1") + "\n2026-11-25T01:02:04Z " + klog + "ready\n2026-11-25T01:02:05.678901234+08:00 " + removal("2") + "\n",
		"kubectl logs --prefix":     "[pod/kube-apiserver-a/kube-apiserver] " + removal("1") + "\n[pod/kube-apiserver-a/kube-apiserver] " + removal("2") + "\n",
		"in the server's own log":   klog + "ready\n" + klog + removal("1") + "\n" + klog + lookup + "\n" + removal("2") + "\nW1125 01:02:03.000004       1 x.go:1] \n",
		"behind syslog's words":     "Nov 25 01:02:03 node-a kube-apiserver[7]: " + removal("1") + "\nNov 25 01:02:03 node-a kube-apiserver[7]: " + removal("2") + "\n",
		"gzip":                      packed(t, two, gzipped),
		"gzip, two in one file":     packed(t, removal("1")+"\n", gzipped) + packed(t, removal("2")+"\n", gzipped),
		"zstd":                      packed(t, two, zstandard),
	} {
		t.Run(name, func(t *testing.T) {
			ids, summary, err := readAll(t, &Reader{Strict: true}, nil, content)
			if err != nil || !slices.Equal(ids, []string{"1", "2"}) || summary.ProblemCount != 0 {
				t.Errorf("read %v, %+v, %v", ids, summary, err)
			}
			if at := time.Date(2026, 11, 25, 1, 2, 3, 4000, time.UTC); !summary.From.Equal(at) || !summary.To.Equal(at) {
				t.Errorf("it covers %s to %s", summary.From, summary.To)
			}
		})
	}
}

func TestStagesBeforeTheEndAreLeftOut(t *testing.T) {
	begun := strings.Replace(removal("1"), StageResponseComplete, "RequestReceived", 1)
	panicked := strings.Replace(removal("2"), StageResponseComplete, StagePanic, 1)
	ids, _, err := readAll(t, &Reader{Strict: true}, nil, begun+"\n"+panicked+"\n"+removal("3"))
	if err != nil || !slices.Equal(ids, []string{"2", "3"}) {
		t.Errorf("read %v, %v", ids, err)
	}
}

func TestBadInput(t *testing.T) {
	good := removal("1") + "\n"
	long := strings.Replace(removal("x"), `"user":{`, `"user":{"uid":"`+strings.Repeat("x", 50<<20)+`",`, 1) + "\n"
	broken := packed(t, strings.Repeat(good, 1000), gzipped)
	for _, c := range []struct {
		name, content string
		events        int
		problems      []string
	}{
		{"a line that is cut off", good + removal("2")[:200] + "\n" + good, 2, []string{"line 2 is cut off or broken"}},
		{"the last line is cut off", good + lookup[:200], 1, []string{"line 2 is cut off or broken"}},
		{"cut off and written on", lookup[:200] + removal("2") + "\n", 1, []string{"line 1 is cut off, and another event follows in it; that one was read"}},
		{"a line of 50 MB", good + long + good, 2, []string{"line 2 was not read: it is longer than 16 MiB. It is about delete /api/v1/namespaces/shop/pods/web-0, and pods that are named only there are missing here"}},
		{"a line of 50 MB without an end", good + strings.TrimSuffix(long, "\n"), 1, []string{"line 2 was not read: it is longer than 16 MiB"}},
		{"no audit log", "GET /healthz 200\nGET /readyz 200\n", 0, []string{"line 1 is no JSON", "line 2 is no JSON", "input is not an audit log: none of its 2 lines has an event"}},
		{"another kind of JSON", `{"level":"info","msg":"delete"}` + "\n" + good, 1, []string{"line 1 is not an audit event"}},
		{"a field of another type", strings.Replace(good, `"sourceIPs":["10.0.0.9"]`, `"sourceIPs":7`, 1) + good, 1, []string{"line 1 is not an audit event: json: cannot unmarshal"}},
		{"an unknown version", strings.ReplaceAll(good, "audit.k8s.io/v1", "audit.k8s.io/v2") + good, 1, []string{`line 1 has an audit event of version "audit.k8s.io/v2", which is not known; audit.k8s.io/v1 is`}},
		{"an unknown version of what cannot matter", strings.ReplaceAll(lookup, "audit.k8s.io/v1", "audit.k8s.io/v1beta1") + "\n" + good, 1, []string{`line 1 has an audit event of version "audit.k8s.io/v1beta1"`}},
		{"an item that is none", `{"kind":"EventList","apiVersion":"audit.k8s.io/v1","items":["delete",` + removal("1") + "]}", 1, []string{"line 1 has an item that is not an audit event"}},
		{"an item of an unknown version", `{"kind":"EventList","apiVersion":"audit.k8s.io/v1","items":[` + strings.ReplaceAll(removal("1"), "audit.k8s.io/v1", "audit.k8s.io/v9") + "," + removal("2") + "]}", 1, []string{`line 1 has an item that is "Event" of "audit.k8s.io/v9"`}},
		{"an item of an unknown version that cannot matter", `{"kind":"EventList","apiVersion":"audit.k8s.io/v1","items":[` + strings.ReplaceAll(lookup, "audit.k8s.io/v1", "audit.k8s.io/v9") + "," + removal("2") + "]}", 1, []string{`line 1 has an item that is "Event" of "audit.k8s.io/v9"`}},
		{"a list that is cut off", "[\n" + removal("1") + ",\n" + removal("2")[:300], 1, []string{"line 3 is cut off or broken"}},
		{"something else in a list", "[\n" + removal("1") + ",\nnonsense\n" + removal("2") + "]", 2, []string{"line 3 is no JSON"}},
		{"a value of 50 MB in a list", "[" + good + "," + long + "," + good + "]", 2, []string{"line 2 was not read: it is longer than 16 MiB. It is about delete"}},
		{"nothing but the server's own log", klog + "ready\n" + klog + "bye\n", 0, []string{"is not an audit log: none of its 2 lines has an event"}},
		{"three that are cut off", lookup[:200] + lookup[:300] + removal("2") + "\n", 1, []string{"line 1 is cut off, and another event follows in it; that one was read"}},
		{"a line of a container runtime that never ends", cri("stdout P", removal("1")) + cri("stderr F", "I1125 01:02:03.4 1 x] x") + cri("stdout F", "") + cri("stdout P", removal("2")), 1, []string{"line 4 is cut off: its container runtime has taken it apart, and its end is missing"}},
		{"a broken archive", broken[:len(broken)-30], 0, []string{"and what follows cannot be read: unexpected EOF"}},
		{"an archive that is none", "\x1f\x8bnonsense", 0, []string{"begins like gzip"}},
		{"a zstd archive that is none", "\x28\xb5\x2f\xfdnonsense", 0, []string{"and what follows cannot be read"}},
		{"what xz has packed", "\xfd7zXZ\x00\n\n", 0, []string{"standard input is packed with xz: unpack it first"}},
		{"what bzip2 has packed", "BZh91AY&SY\n\n", 0, []string{"standard input is packed with bzip2"}},
		{"what zip has packed", "PK\x03\x04\x14\n\n", 0, []string{"standard input is packed with zip"}},
		{"nothing", "", 0, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			ids, summary, err := readAll(t, &Reader{}, nil, c.content)
			if err != nil {
				t.Fatal(err)
			}
			if len(ids) < c.events || c.events > 0 && len(ids) != c.events {
				t.Errorf("read %d events, not %d", len(ids), c.events)
			}
			if int(summary.ProblemCount) != len(c.problems) || len(summary.Problems) != len(c.problems) {
				t.Fatalf("%d problems, not %d: %v", summary.ProblemCount, len(c.problems), summary.Problems)
			}
			// The problem with the whole file comes first.
			for _, want := range c.problems {
				if !slices.ContainsFunc(summary.Problems, func(p Problem) bool { return strings.Contains(p.String(), want) }) {
					t.Errorf("no problem is %q: %v", want, summary.Problems)
				}
			}
			_, _, err = readAll(t, &Reader{Strict: true}, nil, c.content)
			if (err != nil) != (len(c.problems) > 0) || err != nil && !strings.HasPrefix(err.Error(), "standard input") {
				t.Errorf("strict: %v", err)
			}
		})
	}
}

// Who reads that nothing slipped past must see from when to when, also where the first and the last line do not matter, or are none.
func TestTheTimeThatTheLogsCover(t *testing.T) {
	earlier, later := strings.ReplaceAll(lookup, "2026-11-25T01:02:03.0", "2026-11-24T01:02:03.0"), strings.ReplaceAll(lookup, "2026-11-25T01:02:03.0", "2026-11-26T01:02:03.0")
	for name, c := range map[string]struct {
		content string
		from    int
		to      int
	}{
		"lines":                      {earlier + "\n" + removal("1") + "\n" + later + "\n", 24, 26},
		"spaces":                     {spaced(t, earlier) + "\n" + removal("1") + "\n" + spaced(t, later), 24, 26},
		"content of the log service": {fmt.Sprintf(`{"__time__":1,"content":%q}`+"\n"+`{"__time__":2,"content":%q}`, removal("1"), strings.ReplaceAll(removal("2"), "11-25T", "11-26T")), 25, 26},
		"something else around it":   {"x\n" + removal("1") + "\ny\n", 25, 25},
	} {
		t.Run(name, func(t *testing.T) {
			_, summary, err := readAll(t, &Reader{}, nil, c.content)
			if err != nil || summary.From.Day() != c.from || summary.To.Day() != c.to {
				t.Errorf("%v to %v, %v", summary.From, summary.To, err)
			}
		})
	}
}

func TestManyProblemsAreCountedAndTheFirstNamed(t *testing.T) {
	_, summary, err := readAll(t, &Reader{}, nil, removal("1")+"\n"+strings.Repeat("nonsense\n", 1000))
	if err != nil || summary.ProblemCount != 1000 || len(summary.Problems) != maxProblems || summary.Problems[0].Line != 2 {
		t.Errorf("%+v, %v", summary, err)
	}
}

// That a file is none at all tells more than its lines.
func TestWhatIsWrongWithTheWholeFileIsNamedHoweverManyLinesAreBroken(t *testing.T) {
	_, summary, err := readAll(t, &Reader{}, nil, strings.Repeat("nonsense\n", 1000))
	if err != nil || summary.ProblemCount != 1001 || len(summary.Problems) != maxProblems+1 ||
		summary.Problems[0].String() != "standard input is not an audit log: none of its 1000 lines has an event" {
		t.Errorf("%+v, %v", summary, err)
	}
}

func TestSources(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	current, rotated := write("audit.log", removal("1")+"\n"), write("audit-2026.log.gz", packed(t, removal("2")+"\n", gzipped))
	bracket := write("audit[1].log", removal("3")+"\n")
	all := filepath.Join(dir, "audit*")
	if err := os.Symlink(current, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ names, want []string }{
		"a file":                {[]string{current}, []string{"1"}},
		"a pattern":             {[]string{all}, []string{"1", "2", "3"}},
		"a file twice":          {[]string{current, all, current, filepath.Join(dir, "link")}, []string{"1", "2", "3"}},
		"a file like a pattern": {[]string{bracket}, []string{"3"}},
		"standard input twice":  {[]string{"-", rotated, "-"}, []string{"2", "4"}},
	} {
		t.Run(name, func(t *testing.T) {
			ids, summary, err := readAll(t, &Reader{Strict: true}, c.names, removal("4"))
			if err != nil || !slices.Equal(ids, c.want) || summary.Files == 0 {
				t.Errorf("read %v, %+v, %v", ids, summary, err)
			}
		})
	}
	for _, names := range [][]string{{filepath.Join(dir, "missing")}, {filepath.Join(dir, "none*")}, {dir}, {filepath.Join(dir, "[")}} {
		if _, err := Sources(append(names, current), nil); err == nil || !strings.Contains(err.Error(), names[0]) {
			t.Errorf("%v: %v", names, err)
		}
	}
}

func TestAPipeWithAName(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() {
		file, err := os.OpenFile(pipe, os.O_WRONLY, 0)
		if err == nil {
			_, err = file.WriteString(removal("1") + "\n")
			err = errors.Join(err, file.Close())
		}
		written <- err
	}()
	ids, _, err := readAll(t, &Reader{Strict: true}, []string{pipe}, "")
	if err := errors.Join(err, <-written); err != nil || !slices.Equal(ids, []string{"1"}) {
		t.Errorf("read %v, %v", ids, err)
	}
}

func TestReadingEndsWhenItIsCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	sources, err := Sources(nil, io.MultiReader(strings.NewReader(removal("1")+"\n"), endless{}))
	if err != nil {
		t.Fatal(err)
	}
	r := &Reader{Each: func(*Event) { cancel() }}
	if _, err := r.Read(ctx, sources); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

// endless is a log that never ends.
type endless struct{}

func (endless) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = '\n'
	}
	return len(p), nil
}

// Nothing that a caller can choose may make its own event look like one that does not matter.
func TestNobodyCanHideFromTheSelection(t *testing.T) {
	for _, event := range []string{
		strings.Replace(removal("1"), `pods/web-0"`, `pods/web-0?x=\"verb\":\"get\",\"objectRef\":{\"resource\":\"leases\""`, 1),
		strings.Replace(removal("1"), `"auditID":"1"`, `"auditID":"\",\"verb\":\"get\""`, 1),
		strings.Replace(removal("1"), `"username":"jo"`, `"username":"jo","extra":{"objectRef":["resource"],"verb":["get"]}`, 1),
	} {
		if !json.Valid([]byte(event)) {
			t.Fatalf("no JSON: %s", event)
		}
		if ids, _, err := readAll(t, &Reader{Strict: true}, nil, event); err != nil || len(ids) != 1 {
			t.Errorf("not read (%v): %s", err, event)
		}
	}
}
