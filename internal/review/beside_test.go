package review

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/eni-guard/eni-guard/internal/auditlog"
)

// collected is a delete of a collection by force, of which the answer shows these pods.
func collected(annotations []string, pods ...string) *auditlog.Event {
	var items []string
	for _, pod := range pods {
		items = append(items, fmt.Sprintf(`{"metadata":{"namespace":"shop","name":%q,"uid":"uid-%s"},"spec":{"nodeName":"node-1"},"status":{"phase":"Running"}}`, pod, pod))
	}
	e := event("deletecollection  200", "", `{"gracePeriodSeconds":0}`, `{"kind":"PodList","items":[`+strings.Join(items, ",")+`]}`, annotations...)
	e.ObjectRef.Name = ""
	return e
}

// The guard may have been asked about some pods of a collection only; one whose record was cut off was decided about.
func TestTheOtherPodsOfACollection(t *testing.T) {
	const decided = `force-delete.eni-guard.io/pod.uid-web-0={"pod":"shop/web-0","pod-uid":"uid-web-0","decision":"allowed","path":"collection"}`
	const cut = `force-delete.eni-guard.io/pod.uid-web-1={"pod":"sh`
	for _, test := range []struct {
		name        string
		annotations []string
		pods        []string
		want        string
		cut         int64
	}{
		{"all decided", []string{decided}, []string{"web-0"}, "web-0 allowed", 0},
		{"one is not", []string{decided}, []string{"web-0", "web-2"}, "web-0 allowed, web-2 slipped-past", 0},
		{"one is cut off", []string{decided, cut}, []string{"web-0", "web-1"}, "web-0 allowed", 1},
		{"the only one is cut off", []string{cut}, []string{"web-1"}, "", 1},
	} {
		var untold Untold
		got := ""
		for n, r := range (Guard{Namespace: "eni-guard", Release: "eni-guard"}).removalsOf(collected(test.annotations, test.pods...), &untold) {
			if n > 0 {
				got += ", "
			}
			got += r.Pod + " " + string(r.Decision)
		}
		if got != test.want || untold.Records != test.cut {
			t.Errorf("%s: got %q and %d cut off, want %q and %d", test.name, got, untold.Records, test.want, test.cut)
		}
	}
}

// The chart leaves kube-system alone.
func TestRemovalsInExemptNamespaces(t *testing.T) {
	guard := Guard{Namespace: "eni-guard", Release: "eni-guard", Exempt: []string{"shop"}}
	rows := guard.removalsOf(collected(nil, "web-0"), &Untold{})
	if len(rows) != 1 || rows[0].Decision != "exempt" || rows[0].Reason != ReasonExemptNamespace {
		t.Errorf("got %+v", rows)
	}
}

// The same event, written in another zone by whoever collects logs, is one.
func TestOneEventInTwoZones(t *testing.T) {
	live := NewLive(guard)
	first := collected(nil, "web-0")
	second := *first
	second.Received = first.Received.In(time.FixedZone("CST", 8*60*60))
	if len(live.Add(first)) != 1 || len(live.Add(&second)) != 0 || len(reportOf(t, first, &second).Removals) != 1 {
		t.Error("it is told twice")
	}
}
