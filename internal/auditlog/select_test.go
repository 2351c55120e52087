package auditlog

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
)

// recordedEvents are the lines of a log that an API server has written.
func recordedEvents(t testing.TB) [][]byte {
	t.Helper()
	file, err := os.Open("../review/testdata/scenarios.log.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	unpacked, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	if _, err := text.ReadFrom(unpacked); err != nil {
		t.Fatal(err)
	}
	return bytes.Split(bytes.TrimSpace(text.Bytes()), []byte("\n"))
}

// needed says whether the review may need an event, by its content alone: the rule that the selection approximates, in other words.
func needed(e *Event) bool {
	body := unescaped(e.RequestObject)
	has := func(words ...string) bool {
		return slices.ContainsFunc(words, func(word string) bool { return strings.Contains(body, word) })
	}
	if !slices.Contains([]string{"delete", "deletecollection", "create", "update", "patch"}, e.Verb) {
		return false
	}
	deletes := strings.HasPrefix(e.Verb, "delete")
	switch e.ObjectRef.Resource {
	case "pods":
		return deletes || e.Verb == "create" && e.ObjectRef.Subresource == "eviction" || e.Verb != "create" && has("eni-guard.io/", "k8s.aliyun.com/ignore-by-terway", "finalizers")
	case "namespaces":
		return has("eni-guard.io/mode") || deletes && e.ObjectRef.Name == "eni-guard"
	case "nodes":
		return deletes || has("node.kubernetes.io/out-of-service", "virtual-kubelet", "windows")
	case "deployments", "daemonsets":
		return e.ObjectRef.Namespace == "eni-guard"
	default:
		return e.ObjectRef.APIGroup == "rbac.authorization.k8s.io" || strings.HasPrefix(e.ObjectRef.Resource, "validating")
	}
}

// unescaped is JSON in which nothing is escaped that need not be.
func unescaped(text []byte) string {
	var value any
	if json.Unmarshal(text, &value) != nil {
		return ""
	}
	plain, _ := json.Marshal(value)
	return string(plain)
}

// rewriter writes JSON anew, the same in another way.
type rewriter struct {
	*rand.Rand

	// It may shuffle fields, put spaces between them, and escape letters, of all texts or only of a body: a patch is in the log as it was sent.
	shuffle, space, escape, escapeBody bool
}

func (r rewriter) gap() string {
	if !r.space {
		return ""
	}
	return []string{"", " ", "  ", "\t"}[r.IntN(4)]
}

func (r rewriter) text(text string) string {
	var out strings.Builder
	for _, c := range text {
		if r.escape && c < 128 && r.IntN(8) == 0 {
			fmt.Fprintf(&out, `\u%04x`, c)
			continue
		}
		plain, _ := json.Marshal(string(c))
		out.Write(plain[1 : len(plain)-1])
	}
	return `"` + out.String() + `"`
}

// order is that of the fields of the API server's events.
var order = strings.Fields("kind apiVersion level auditID stage requestURI verb user impersonatedUser authenticationMetadata sourceIPs userAgent objectRef responseStatus requestObject responseObject requestReceivedTimestamp stageTimestamp annotations resource namespace name uid apiGroup")

func (r rewriter) value(value any) string {
	switch value := value.(type) {
	case map[string]any:
		keys := slices.Sorted(maps.Keys(value))
		if r.shuffle {
			r.Shuffle(len(keys), func(i, j int) { keys[i], keys[j] = keys[j], keys[i] })
		} else {
			slices.SortStableFunc(keys, func(a, b string) int {
				return slices.Index(order, a)&0xff - slices.Index(order, b)&0xff
			})
		}
		var fields []string
		for _, key := range keys {
			inner := r
			inner.escape = r.escape || r.escapeBody && key == "requestObject"
			fields = append(fields, r.gap()+r.text(key)+r.gap()+":"+r.gap()+inner.value(value[key])+r.gap())
		}
		return "{" + strings.Join(fields, ",") + "}"
	case []any:
		var items []string
		for _, item := range value {
			items = append(items, r.gap()+r.value(item)+r.gap())
		}
		return "[" + strings.Join(items, ",") + "]"
	case string:
		return r.text(value)
	default:
		text, _ := json.Marshal(value)
		return string(text)
	}
}

// disguises are what a caller, or who collects logs, may put around and into an event, so that it looks like another one.
var disguises = []func(map[string]any, *rand.Rand){
	func(map[string]any, *rand.Rand) {},
	func(e map[string]any, _ *rand.Rand) {
		e["auditID"] = `","verb":"get","objectRef":{"resource":"leases"},"x":"`
	},
	func(e map[string]any, _ *rand.Rand) {
		e["requestURI"] = fmt.Sprint(e["requestURI"]) + `?a=\","verb":"get`
	},
	func(e map[string]any, _ *rand.Rand) { e["userAgent"] = `x","objectRef":{"resource":"leases","name":"` },
	func(e map[string]any, _ *rand.Rand) {
		user, _ := e["user"].(map[string]any)
		if user == nil {
			return
		}
		user["extra"] = map[string]any{"objectRef": []any{"resource", "leases"}, "verb": []any{"get"}}
	},
	func(e map[string]any, _ *rand.Rand) {
		body, _ := e["requestObject"].(map[string]any)
		if body != nil {
			body["verb"], body["objectRef"] = "get", map[string]any{"resource": "leases"}
		}
	},
	func(e map[string]any, r *rand.Rand) {
		e["verb"] = []string{"get", "create", "update", "patch", "delete", "deletecollection"}[r.IntN(6)]
	},
	func(e map[string]any, r *rand.Rand) {
		ref, _ := e["objectRef"].(map[string]any)
		if ref != nil {
			ref["resource"] = []string{"pods", "nodes", "namespaces", "clusterroles", "deployments", "leases", "validatingwebhookconfigurations"}[r.IntN(7)]
		}
	},
	func(e map[string]any, r *rand.Rand) {
		words := []string{"eni-guard.io/mode", "eni-guard.io/allow-force-delete", "k8s.aliyun.com/ignore-by-terway", "finalizers", "node.kubernetes.io/out-of-service", "windows", "web"}
		resource := []string{"pods", "namespaces", "nodes"}[r.IntN(3)]
		e["verb"], e["requestObject"] = "patch", map[string]any{"metadata": map[string]any{words[r.IntN(len(words))]: "x"}}
		e["objectRef"] = map[string]any{"resource": resource, "name": "web-0", "apiVersion": "v1"}
		// Nothing else of it tells.
		e["requestURI"], e["userAgent"] = "/api/v1/"+resource+"/web-0", "kubectl"
		delete(e, "annotations")
		delete(e, "responseObject")
	},
}

// lost tells of an event that the review needs and would not get, written in this way.
func lost(seed uint64, recorded []byte) string {
	r := rewriter{Rand: rand.New(rand.NewPCG(seed, 1))}
	r.shuffle, r.space, r.escape, r.escapeBody = r.IntN(2) == 0, r.IntN(2) == 0, r.IntN(3) == 0, r.IntN(2) == 0
	var event map[string]any
	if json.Unmarshal(recorded, &event) != nil {
		return ""
	}
	for range r.IntN(3) {
		// The last has the most to it.
		disguises[min(r.IntN(2*len(disguises)), len(disguises)-1)](event, r.Rand)
	}
	text := r.value(event)
	var wrapped string
	switch r.IntN(4) {
	case 0:
		wrapped = `{"kind":"EventList","apiVersion":"audit.k8s.io/v1","items":[` + text + `]}`
	case 1:
		outer, _ := json.Marshal(map[string]string{"content": text})
		wrapped = string(outer)
	default:
		wrapped = text
	}
	var l line
	if json.Unmarshal([]byte(text), &l) != nil || l.Kind != "Event" || l.APIVersion != knownVersion || l.Stage != StageResponseComplete || !needed(l.event()) {
		return ""
	}
	found := 0
	f := &fileReader{Reader: &Reader{Selection: Selection{GuardNamespace: "eni-guard"}, Each: func(*Event) { found++ }}, part: &Summary{}}
	if err := f.line([]byte(wrapped)); err != nil || found != 1 {
		return fmt.Sprintf("seed %d: %d events of (%v)\n%s", seed, found, err, wrapped)
	}
	return ""
}

// However an event is written, in whatever order, with spaces and escapes, and whatever a caller puts into it: what the review needs is not left out.
func TestNothingIsLeftOutHoweverItIsWritten(t *testing.T) {
	checked := 0
	for i, event := range recordedEvents(t) {
		for variant := range uint64(5) {
			if told := lost(uint64(i)<<8|variant, event); told != "" {
				t.Fatal(told)
			}
			checked++
		}
	}
	if checked < 2000 {
		t.Errorf("only %d were tried", checked)
	}
}

// FuzzSelection looks for more of the same.
func FuzzSelection(f *testing.F) {
	for i, event := range recordedEvents(f) {
		if i%50 == 0 {
			f.Add(uint64(i), event)
		}
	}
	f.Fuzz(func(t *testing.T, seed uint64, event []byte) {
		if told := lost(seed, event); told != "" {
			t.Error(told)
		}
	})
}

// What the API server writes most is left out without being parsed: that is why reviewing is fast.
func TestWhatCannotMatterIsNotParsed(t *testing.T) {
	for _, line := range []string{
		lookup,
		strings.Replace(removal("1"), `"resource":"pods"`, `"resource":"leases"`, 1),
		strings.Replace(strings.Replace(removal("1"), `"verb":"delete"`, `"verb":"patch"`, 1), "/pods/web-0", `/pods/web-0?a=1\u0026b=\"2\"`, 1),
		strings.Replace(removal("1"), `"verb":"delete"`, `"verb":"create"`, 1),
	} {
		s := Selection{GuardNamespace: "eni-guard"}
		if s.mayMatter([]byte(line)) {
			t.Errorf("parsed: %s", line)
		}
	}
}
