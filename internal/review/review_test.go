package review

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"

	"github.com/eni-guard/eni-guard/internal/auditlog"
)

// The logs in testdata come from the API server of hack/cluster, as their README says.

var guard = Guard{Namespace: "eni-guard", Release: "eni-guard"}

// recorded returns the lines of a recorded log.
func recorded(t testing.TB, name string) []string {
	t.Helper()
	file, err := os.Open("testdata/" + name + ".log.gz")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	unpacked, err := gzip.NewReader(file)
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(unpacked)
	if err != nil {
		t.Fatal(err)
	}
	return slices.Collect(strings.Lines(string(text)))
}

// reported is a report, read back.
type reported struct {
	Removals []Removal
	Changes  []Change
	Untold   Untold
	Totals   Totals
}

// report has the review report what a filter selects.
func report(t testing.TB, review *Review, filter Filter) reported {
	t.Helper()
	found, err := review.Report(filter)
	if err != nil {
		t.Fatal(err)
	}
	all := reported{Untold: found.Untold, Totals: found.Totals}
	for r, err := range found.Removals() {
		if err != nil {
			t.Fatal(err)
		}
		all.Removals = append(all.Removals, r)
	}
	for c, err := range found.Changes() {
		if err != nil {
			t.Fatal(err)
		}
		all.Changes = append(all.Changes, c)
	}
	if err := found.Close(); err != nil || int(found.Count) != len(all.Removals) {
		t.Errorf("%d removals, %d counted, %v", len(all.Removals), found.Count, err)
	}
	return all
}

// reportOf is the report of events.
func reportOf(t testing.TB, events ...*auditlog.Event) reported {
	t.Helper()
	review := New(guard)
	for _, e := range events {
		if err := review.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	all := report(t, review, Filter{})
	if err := review.Close(); err != nil {
		t.Error(err)
	}
	return all
}

// reviewed reads logs, each a file, as many at a time as there are processors, and reports.
func reviewed(t testing.TB, logs ...[]string) reported {
	t.Helper()
	return reviewedBy(t, New(guard), logs...)
}

func reviewedBy(t testing.TB, review *Review, logs ...[]string) reported {
	t.Helper()
	dir := t.TempDir()
	var names []string
	for i, log := range logs {
		names = append(names, filepath.Join(dir, fmt.Sprintf("audit-%d.log", i)))
		if err := os.WriteFile(names[i], []byte(strings.Join(log, "")), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sources, err := auditlog.Sources(names, nil)
	if err != nil {
		t.Fatal(err)
	}
	var failed error
	reader := &auditlog.Reader{Selection: auditlog.Selection{GuardNamespace: guard.Namespace}, Each: func(e *auditlog.Event) { failed = errors.Join(failed, review.Add(e)) }, Strict: true}
	if _, err := reader.Read(t.Context(), sources); err != nil || failed != nil {
		t.Fatal(err, failed)
	}
	defer review.Close()
	return report(t, review, Filter{})
}

// rows are removals as the end-to-end test notes them.
func rows(removals []Removal) []string {
	var all []string
	for _, r := range removals {
		row := fmt.Sprintf("%s/%s %s %s %s %s %s", r.Namespace, r.Pod, r.User, r.Path, r.Decision, r.Outcome, r.Reason)
		if r.Then != nil {
			row += " " + string(r.Then.How)
		}
		all = append(all, row)
	}
	return all
}

// noted are the lines in which the end-to-end test has noted what it did.
func noted(t testing.TB, name string) []string {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}

func TestARecordedLogTellsWhatWasDone(t *testing.T) {
	found := reviewed(t, recorded(t, "every-way"))
	want := noted(t, "every-way.txt")
	if got := rows(found.Removals); !slices.Equal(got, want) {
		t.Fatalf("it is not as it was done:\n%s\nnot\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	counted := func(of func(fields []string) string) []Count {
		all := map[string]int{}
		for _, row := range want {
			all[of(strings.Fields(row))]++
		}
		return counts(all, 1)
	}
	for name, c := range map[string]struct{ got, want []Count }{
		"decision":  {found.Totals.Decisions, counted(func(fields []string) string { return fields[3] })},
		"user":      {found.Totals.Users, counted(func(fields []string) string { return fields[1] })},
		"namespace": {found.Totals.Namespaces, counted(func(fields []string) string { return strings.Split(fields[0], "/")[0] })},
		"node": {found.Totals.Nodes, counted(func(fields []string) string {
			if fields[3] == string(Unanswered) { // before anybody has read the pod
				return ""
			}
			return "node-1"
		})},
	} {
		if !slices.Equal(c.got, c.want) {
			t.Errorf("by %s there are %v, and %v were made", name, c.got, c.want)
		}
	}
	if found.Untold != (Untold{}) {
		t.Errorf("the policy that the log was recorded with leaves something untold: %+v", found.Untold)
	}
	for _, r := range found.Removals {
		if missing := r.Node == "" || len(r.Addresses) == 0 || r.UID == ""; missing != (r.Decision == Unanswered) {
			t.Errorf("node %q, addresses %v, UID %q: %s", r.Node, r.Addresses, r.UID, rows([]Removal{r})[0])
		}
	}
}

func TestWhatBecameOfPodsThatStayed(t *testing.T) {
	var got []string
	for _, r := range reviewed(t, recorded(t, "every-way")).Removals {
		if r.Then != nil {
			got = append(got, fmt.Sprintf("%s %s: %s by %s, override %q, by name %t", r.Pod, r.Decision, strings.TrimSpace(string(r.Then.How)+" "+string(r.Then.Decision)), r.Then.By, r.Then.Override, r.Then.ByName))
			if r.Then.After <= 0 || r.Then.After > 60 {
				t.Errorf("%s: %v seconds", r.Pod, r.Then.After)
			}
		}
	}
	want := []string{
		`web-0 denied: ended by system:node:node-1, override "", by name false`,
		`web-1 denied: forced overridden by operator@example.com, override "the node is on fire, ticket 4711", by name false`,
		`web-2 denied: ended by system:node:node-1, override "", by name false`,
		`web-0 held: freed by system:serviceaccount:eni-guard:eni-guard-webhook, override "", by name false`,
		`kept-0 audited: stripped by kubernetes-admin, override "", by name true`,
		`web-3 unanswered: ended by system:node:node-1, override "", by name true`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s\nnot\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestWhoWeakenedTheGuard(t *testing.T) {
	var got []string
	for _, c := range reviewed(t, recorded(t, "every-way")).Changes {
		if c.Weakens {
			got = append(got, fmt.Sprintf("%s %s: %s", c.User, c.Object, c.What))
		}
	}
	if want := noted(t, "weakened.txt"); !slices.Equal(got, want) {
		t.Errorf("%s\nnot\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// What changes.sh types, as kubectl makes it of that.
func TestChangesAsPeopleTypeThem(t *testing.T) {
	found := reviewed(t, recorded(t, "changes"))
	var got []string
	for _, c := range found.Changes {
		if c.Weakens {
			got = append(got, c.Object+": "+c.What)
		}
	}
	for _, r := range found.Removals {
		got = append(got, fmt.Sprintf("%s by %s %s: %s %s %s", r.Pod, r.User, r.ImpersonatedBy, r.Decision, r.Outcome, r.Reason))
	}
	more := regexp.MustCompile("/more-[a-z0-9]{5}:")
	want := []string{
		"rolebinding shop/oncall: the right to override for User jo",
		"rolebinding shop/more-…: the right to override for User mo",
		"clusterrole ops: has the right to override",
		"validatingwebhookconfiguration eni-guard: changed, what it is asked about: namespaceSelector",
		"validatingwebhookconfiguration eni-guard: changed, what it is asked about: matchConditions",
		"validatingwebhookconfiguration eni-guard: changed, a webhook taken away",
		"namespace shop: mode off",
		"deployment eni-guard/eni-guard-webhook: replicas 0",
		"node node-1: taint node.kubernetes.io/out-of-service",
		`pod shop/web-3: override: "fire"`,
		"validatingwebhookconfiguration eni-guard-failing-open: deleted",
		"web-0 by kubernetes-admin : unanswered refused WebhookDown",
		"web-0 by system:node:node-1 kubernetes-admin: slipped-past removed Impersonated",
		"web-1 by kubernetes-admin : slipped-past removed ConfigurationNarrowed",
		"web-2 by kubernetes-admin : slipped-past removed ConfigurationDeleted",
	}
	if text := more.ReplaceAllString(strings.Join(got, "\n"), "/more-…:"); text != strings.Join(want, "\n") {
		t.Errorf("%s\nnot\n%s", text, strings.Join(want, "\n"))
	}
}

// Counted in another way: every decision that the guard has written, except those about what is not forced and about dry runs.
func TestTheTotalsOfManyScenarios(t *testing.T) {
	log := recorded(t, "scenarios")
	want := map[string]int{}
	for _, line := range log {
		var event struct {
			RequestURI    string
			RequestObject json.RawMessage
			Annotations   map[string]string
		}
		if err := json.Unmarshal([]byte(line), &event); err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(event.RequestObject, []byte(`"dryRun":[`)) {
			continue
		}
		for key, value := range event.Annotations {
			fields := map[string]string{"decision": value, "reason": event.Annotations["force-delete.eni-guard.io/reason"]}
			if strings.HasPrefix(key, "force-delete.eni-guard.io/pod.") {
				if err := json.Unmarshal([]byte(value), &fields); err != nil {
					t.Fatal(err)
				}
			} else if key != "force-delete.eni-guard.io/decision" {
				continue
			}
			if fields["reason"] != "NotForced" {
				want[fields["decision"]]++
			}
		}
	}
	got := map[string]int{}
	for _, r := range reviewed(t, log).Removals {
		if !r.Inferred {
			got[string(r.Decision)]++
		}
	}
	if !reflect.DeepEqual(got, want) || len(want) != 6 {
		t.Errorf("%v, not %v", got, want)
	}
}

// What the selection leaves out before parsing tells nothing.
func TestNothingThatMattersIsLeftOut(t *testing.T) {
	for _, name := range []string{"every-way", "scenarios", "changes"} {
		log := recorded(t, name)
		spaced := make([]string, len(log))
		for i, line := range log {
			// With a space after the brace, a line is not what the API server writes, and is parsed.
			spaced[i] = "{ " + line[1:]
		}
		same(t, name, reviewed(t, spaced), reviewed(t, log))
	}
}

// withoutThen is a report without what needs the whole log: what became of pods, and why something slipped past.
func withoutThen(r reported) reported {
	for i := range r.Removals {
		row := &r.Removals[i]
		row.Then = nil
		if row.Decision == SlippedPast {
			row.Reason, row.Mode = "", ""
		}
		if row.Inferred {
			row.Mode = ""
		}
	}
	return r
}

func same(t *testing.T, what string, got, want reported) {
	t.Helper()
	if len(want.Removals) == 0 || !reflect.DeepEqual(got, want) {
		t.Fatalf("%s: %d removals and %d changes, not the same %d and %d", what, len(got.Removals), len(got.Changes), len(want.Removals), len(want.Changes))
	}
}

func TestPropertiesOfReports(t *testing.T) {
	log := recorded(t, "scenarios")
	whole := reviewed(t, log)
	random := rand.New(rand.NewPCG(1, 2))
	for range 3 {
		cut := random.IntN(len(log))
		a, b := log[:cut], log[cut:]
		same(t, "two files", reviewed(t, a, b), whole)
		same(t, "two files in the other order", reviewed(t, b, a), whole)
		// Each by itself: together they have every row of the whole, and no other.
		first, second := withoutThen(reviewed(t, a)), withoutThen(reviewed(t, b))
		both := slices.Concat(first.Removals, second.Removals)
		slices.SortStableFunc(both, func(x, y Removal) int { return x.Time.Compare(y.Time) })
		sum, all := map[string]int{}, map[string]int{}
		for i, row := range withoutThen(reviewed(t, log)).Removals {
			all[fmt.Sprintf("%+v", row)]++
			sum[fmt.Sprintf("%+v", both[i])]++
		}
		if len(both) != len(whole.Removals) || !reflect.DeepEqual(sum, all) {
			t.Fatalf("the rows of lines 1 to %d and of those after it are not the rows of all", cut)
		}
		// Rotated files that overlap, as where one was copied while it was written.
		overlap := min(len(log), cut+random.IntN(len(log)))
		same(t, "overlapping files", reviewed(t, log[:overlap], b), whole)
		// Many files, which are read at the same time, named in any order, each going on in the next.
		var files [][]string
		for at := 0; at < len(log); at += 100 {
			files = append(files, log[at:min(len(log), at+120)])
		}
		random.Shuffle(len(files), func(i, j int) { files[i], files[j] = files[j], files[i] })
		same(t, "shuffled files", reviewed(t, files...), whole)
		shuffled := slices.Clone(log)
		random.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		same(t, "shuffled lines", reviewed(t, shuffled), whole)
	}
}

// Whatever fits into memory, the report is the same.
func TestAReportThatDoesNotFitIntoMemory(t *testing.T) {
	log := recorded(t, "scenarios")
	review := newReview(guard, 1<<10)
	got := reviewedBy(t, review, log)
	same(t, "with hardly any memory", got, reviewed(t, log))
}

// The stages of one request are one row, in any order; a panic counts only where nothing else tells how the request ended.
func TestStagesOfOneRequestAreOneRow(t *testing.T) {
	log := recorded(t, "every-way")
	whole := reviewed(t, log)
	var staged []string
	for _, line := range log {
		received := strings.Replace(line, `"stage":"ResponseComplete"`, `"stage":"RequestReceived"`, 1)
		panicked := strings.Replace(line, `"stage":"ResponseComplete"`, `"stage":"Panic"`, 1)
		staged = append(staged, received, panicked, line, strings.Replace(received, "RequestReceived", "ResponseStarted", 1))
	}
	same(t, "all stages", reviewed(t, staged), whole)
	slices.Reverse(staged)
	same(t, "all stages, in the other order", reviewed(t, staged), whole)
	onlyPanics := make([]string, len(log))
	for i, line := range log {
		onlyPanics[i] = strings.Replace(line, `"stage":"ResponseComplete"`, `"stage":"Panic"`, 1)
	}
	same(t, "panics", reviewed(t, onlyPanics), whole)
}

// A client chooses the audit ID of its request, and must not hide one removal behind another.
func TestOneAuditIDForTwoRequests(t *testing.T) {
	one := `{"kind":"Event","apiVersion":"audit.k8s.io/v1","level":"Metadata","auditID":"1","stage":"ResponseComplete","requestURI":"/api/v1/namespaces/shop/pods/web-0?gracePeriodSeconds=0",` +
		`"verb":"delete","user":{"username":"jo"},"objectRef":{"resource":"pods","namespace":"shop","name":"web-0"},"responseStatus":{"code":200},"requestReceivedTimestamp":"2026-11-25T01:02:03.000004Z"}` + "\n"
	if n := len(reviewed(t, []string{one, one}).Removals); n != 1 {
		t.Errorf("the same twice is %d rows", n)
	}
	if n := len(reviewed(t, []string{one, strings.ReplaceAll(one, "web-0", "web-1")}).Removals); n != 2 {
		t.Errorf("two removals are %d rows", n)
	}
}

// A collection delete that is refused at one pod has removed those before it.
func TestACollectionThatIsRefusedInTheMiddle(t *testing.T) {
	record := func(pod, decision string) string {
		return guardPrefix + "pod." + pod + `={"decision":"` + decision + `","path":"collection","pod-uid":"` + pod + `","pod":"shop/` + pod + `","reason":"x"}`
	}
	for _, r := range guard.removalsOf(event("deletecollection  409", "", `{"gracePeriodSeconds":0}`, "", record("a", "allowed"), record("b", "denied")), &Untold{}) {
		if r.Gone() != (r.Pod == "a") {
			t.Errorf("%s: gone %t", r.Pod, r.Gone())
		}
	}
}
