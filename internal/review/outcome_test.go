package review

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"

	"github.com/eni-guard/eni-guard/internal/auditlog"
)

const forcedBody = `{"gracePeriodSeconds":0}`

func decidedAs(decision string) []string {
	return []string{guardPrefix + "decision=" + decision, guardPrefix + "reason=x", guardPrefix + "pod=shop/web-0", guardPrefix + "pod-uid=u", guardPrefix + "path=delete", guardPrefix + "node=node-1"}
}

// What the API server has answered says what became of a removal; the decision alone does not.
func TestTheOutcomeOfARemoval(t *testing.T) {
	finalizer := pod(markedNow+`,"finalizers":["example.com/hook"]`, "", "")
	collected := event("deletecollection  500", "", forcedBody, "", guardPrefix+`pod.u={"decision":"allowed","path":"collection","pod-uid":"u","pod":"shop/web-0"}`)
	for _, c := range []struct {
		name  string
		event *auditlog.Event
		want  Outcome
	}{
		{"let through", event("delete  200", "", forcedBody, pod(markedNow, "", ""), decidedAs("audited")...), OutcomeRemoved},
		{"not asked", event("delete  200", "", forcedBody, pod(markedNow, "", "")), OutcomeRemoved},
		{"held by the guard", event("delete  200", "", forcedBody, "", decidedAs("held")...), OutcomeHeld},
		{"held by somebody else's finalizer", event("delete  200", "", forcedBody, finalizer, decidedAs("audited")...), OutcomeHeld},
		{"held, though nobody was asked", event("delete  200", "", forcedBody, finalizer), OutcomeHeld},
		{"the address of a held pod let go", event("patch  200", "", `{"metadata":{"labels":{"k8s.aliyun.com/ignore-by-terway":"true"}}}`, finalizer, decidedAs("audited")...), OutcomeRemoved},
		{"refused", event("delete  409", "", forcedBody, "", decidedAs("denied")...), OutcomeRefused},
		{"let through, and refused by another webhook", event("delete  403", "", forcedBody, "", decidedAs("overridden")...), OutcomeFailed},
		{"let through, and gone already", event("delete  404", "", forcedBody, "", decidedAs("allowed")...), OutcomeFailed},
		{"no answer on record", event("delete  0", "", forcedBody, "", decidedAs("allowed")...), OutcomeUntold},
		{"given up by the API server", event("delete  504", "", forcedBody, "", decidedAs("allowed")...), OutcomeUntold},
		{"given up by the API server, after it was refused at first", event("delete  504", "", forcedBody, "", decidedAs("denied")...), OutcomeUntold},
		{"a collection that failed", collected, OutcomeUntold},
	} {
		t.Run(c.name, func(t *testing.T) {
			rows := guard.removalsOf(c.event, &Untold{})
			if len(rows) != 1 || rows[0].Outcome != c.want {
				t.Errorf("not %s: %+v", c.want, rows)
			}
		})
	}
}

// later is an event so many seconds after the first.
func later(seconds int, e *auditlog.Event) *auditlog.Event {
	e.Received = e.Received.Add(time.Duration(seconds) * time.Second)
	e.AuditID = fmt.Sprint(seconds)
	return e
}

// Who removed it in the end, and how long after: whatever has kept it.
func TestWhatBecameOfPodsThatWereKept(t *testing.T) {
	kubelet := func() *auditlog.Event {
		e := event("delete  200", "", `{"gracePeriodSeconds":0,"preconditions":{"uid":"u"}}`, "")
		e.User.Username, e.User.Groups = "system:node:node-1", []string{"system:nodes"}
		return e
	}
	strip := func(body string) *auditlog.Event { return event("patch  200", "", body, "") }
	byGuard := func() *auditlog.Event {
		e := strip(`{"metadata":{"uid":"u","$deleteFromPrimitiveList/finalizers":["eni-guard.io/sandbox-in-use"]}}`)
		e.User.Username = "system:serviceaccount:eni-guard:eni-guard-webhook"
		return e
	}
	acted := func(e *auditlog.Event) *auditlog.Event {
		e.ImpersonatedUser = &authenticationv1.UserInfo{Username: e.User.Username, Groups: e.User.Groups}
		e.User = authenticationv1.UserInfo{Username: "jo"}
		return e
	}
	held := func() *auditlog.Event { return event("delete  200", "", forcedBody, "", decidedAs("held")...) }
	failed := func() *auditlog.Event { return event("delete  403", "", forcedBody, "", decidedAs("overridden")...) }
	denied := func() *auditlog.Event { return event("delete  409", "", forcedBody, "", decidedAs("denied")...) }
	for _, c := range []struct {
		name   string
		events []*auditlog.Event
		want   string
	}{
		{"a kubelet's delete leaves a held pod", []*auditlog.Event{held(), later(1, kubelet())}, ""},
		{"somebody acts as the kubelet", []*auditlog.Event{denied(), later(2, acted(kubelet()))}, "forced by system:node:node-1 after 2"},
		{"the guard frees it", []*auditlog.Event{held(), later(5, byGuard())}, "freed by system:serviceaccount:eni-guard:eni-guard-webhook after 5"},
		{"somebody acts as the guard", []*auditlog.Event{held(), later(5, acted(byGuard()))}, "forced by system:serviceaccount:eni-guard:eni-guard-webhook after 5"},
		{"somebody takes all finalizers", []*auditlog.Event{held(), later(1, kubelet()), later(5, strip(`{"metadata":{"finalizers":null}}`))}, "stripped by jo after 5"},
		{"somebody takes one by its number", []*auditlog.Event{held(), later(5, strip(`[{"op":"remove","path":"/metadata/finalizers/0"}]`))}, "stripped by jo after 5"},
		{"somebody takes the guard's", []*auditlog.Event{held(), later(5, strip(`{"metadata":{"$deleteFromPrimitiveList/finalizers":["eni-guard.io/sandbox-in-use"]}}`))}, "forced by jo after 5"},
		{"finalizers do not keep a refused pod", []*auditlog.Event{denied(), later(2, strip(`{"metadata":{"finalizers":[]}}`)), later(5, kubelet())}, "ended by system:node:node-1 after 5"},
		{"finalizers do not keep a refused pod, and nothing else tells", []*auditlog.Event{denied(), later(2, strip(`{"metadata":{"finalizers":[]}}`))}, ""},
		{"after a removal that failed", []*auditlog.Event{failed(), later(7, kubelet())}, "ended by system:node:node-1 after 7"},
		{"not what was before", []*auditlog.Event{later(3, denied()), kubelet()}, ""},
		{"the first that came", []*auditlog.Event{denied(), later(9, kubelet()), later(4, kubelet())}, "ended by system:node:node-1 after 4"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for range 2 {
				found := reportOf(t, c.events...)
				got := ""
				if then := found.Removals[0].Then; then != nil {
					got = fmt.Sprintf("%s by %s after %g", then.How, then.By, then.After)
				}
				if got != c.want {
					t.Errorf("%q, not %q", got, c.want)
				}
				slices.Reverse(c.events)
			}
		})
	}
}

// Several backends may record one event, at several levels, with bodies cut off or not.
func TestTheFullestCopyOfAnEventCounts(t *testing.T) {
	full := func() *auditlog.Event {
		return event("delete  200", "", `{"gracePeriodSeconds":30}`, pod(markedSoon, "", ""))
	}
	metadata := func() *auditlog.Event { return event("delete  200", "", "", "") }
	forced := event("delete  200", "", forcedBody, pod(markedNow, "", ""))
	cut := event("delete  200", "", forcedBody, "")
	panicked := event("delete  500", "", forcedBody, "")
	panicked.Stage = auditlog.StagePanic
	for _, c := range []struct {
		name      string
		copies    []*auditlog.Event
		rows      string
		undecided int64
	}{
		{"graceful", []*auditlog.Event{full(), metadata()}, "", 0},
		{"nothing but metadata", []*auditlog.Event{metadata(), metadata()}, "", 1},
		{"forced, its answer cut off in one copy", []*auditlog.Event{cut, forced}, "node-1", 0},
		{"a panic", []*auditlog.Event{panicked, forced}, "node-1", 0},
	} {
		for range 2 {
			found := reportOf(t, c.copies...)
			var nodes []string
			for _, r := range found.Removals {
				nodes = append(nodes, r.Node)
			}
			if strings.Join(nodes, " ") != c.rows || found.Untold.Deletes != c.undecided {
				t.Errorf("%s: %q and %d untold, not %q and %d", c.name, nodes, found.Untold.Deletes, c.rows, c.undecided)
			}
			slices.Reverse(c.copies)
		}
	}
}

// A removal of which the log does not have what a filter asks about is neither selected nor silently left out.
func TestAFilterTellsWhatItCannotTell(t *testing.T) {
	review := New(guard)
	defer review.Close()
	unanswered := later(1, event("delete  500", "", forcedBody, ""))
	unanswered.ResponseStatus.Message = `failed calling webhook "force-delete.eni-guard.io": connection refused`
	for _, e := range []*auditlog.Event{event("delete  200", "", forcedBody, pod(markedNow, "", "")), unanswered, later(2, event("delete  200", "", "", ""))} {
		if err := review.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	const uid = "8c3f5a52-0d3c-4d0e-9d3e-0123456789ab"
	for _, c := range []struct {
		name                       string
		filter                     Filter
		rows, unmatched, undecided int
	}{
		{"everything", Filter{}, 2, 0, 1},
		{"the node", Filter{Nodes: []string{"node-1"}}, 1, 1, 1},
		{"another node", Filter{Nodes: []string{"node-2"}}, 0, 1, 1},
		{"the pod", Filter{Pods: []string{"web-0"}}, 2, 0, 1},
		{"another pod", Filter{Pods: []string{"web-1"}}, 0, 0, 0},
		{"a UID", Filter{Pods: []string{uid}}, 0, 1, 1},
		{"another namespace", Filter{Namespaces: []string{"bank"}}, 0, 0, 0},
		{"another user", Filter{Users: []string{"mo"}, Nodes: []string{"node-1"}}, 0, 0, 0},
		{"later", Filter{Since: time.Unix(100, 0)}, 0, 0, 0},
		// What is untold has neither.
		{"a decision and a verdict", Filter{Decisions: []Decision{"denied"}, Verdicts: []string{"bound"}}, 0, 0, 1},
	} {
		found := report(t, review, c.filter)
		if len(found.Removals) != c.rows || int(found.Untold.Unmatched) != c.unmatched || int(found.Untold.Deletes) != c.undecided {
			t.Errorf("%s: %d rows, %d cannot be told, %d deletes untold; not %d, %d, %d", c.name, len(found.Removals), found.Untold.Unmatched, found.Untold.Deletes, c.rows, c.unmatched, c.undecided)
		}
	}
}

// Filters are for changes, too, as far as these are about a namespace, a pod or a node.
func TestFiltersSelectChanges(t *testing.T) {
	review := New(guard)
	defer review.Close()
	on := func(at int, e *auditlog.Event, resource, namespace, name string) *auditlog.Event {
		e = later(at, e)
		e.ObjectRef = auditlog.ObjectRef{Resource: resource, Namespace: namespace, Name: name}
		return e
	}
	off := `{"metadata":{"labels":{"eni-guard.io/mode":"off"}}}`
	impersonated := event("delete  200", "", "", "")
	impersonated.ImpersonatedUser = &authenticationv1.UserInfo{Username: "mo"}
	for _, e := range []*auditlog.Event{
		on(1, event("patch  200", "", off, ""), "namespaces", "shop", "shop"),
		on(2, event("patch  200", "", off, ""), "namespaces", "bank", "bank"),
		on(3, event("patch  200", "", `{"metadata":{"annotations":{"eni-guard.io/allow-force-delete":"fire"}}}`, ""), "pods", "shop", "web-0"),
		on(4, event("delete  200", "", "", ""), "nodes", "", "node-1"),
		on(5, impersonated, "validatingwebhookconfigurations", "", "eni-guard"),
		on(6, event("delete  200", "", "", ""), "daemonsets", "eni-guard", "eni-guard-agent"),
		on(7, event("delete  200", "", "", ""), "namespaces", "eni-guard", "eni-guard"),
		on(8, event("delete  200", "", "", ""), "roles", "eni-guard", "eni-guard-webhook"),
		on(9, event("create  201", "", `{"roleRef":{"name":"eni-guard-override"},"subjects":[{"kind":"User","name":"jo"}]}`, ""), "rolebindings", "bank", "oncall"),
	} {
		if err := review.Add(e); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		filter Filter
		want   string
	}{
		{Filter{}, "1 2 3 4 5 6 7 8 9"},
		// What is done to the guard itself is done to all namespaces.
		{Filter{Namespaces: []string{"shop"}}, "1 3 4 5 6 7 8"},
		{Filter{Pods: []string{"web-1"}}, "1 2 4 5 6 7 8 9"},
		{Filter{Nodes: []string{"node-2"}}, "1 2 3 5 6 7 8 9"},
		{Filter{Users: []string{"mo"}}, "5"},
		{Filter{Users: []string{"jo"}}, "1 2 3 4 5 6 7 8 9"},
		{Filter{Users: []string{"bo"}}, ""},
		{Filter{Since: time.Unix(4, 0), Until: time.Unix(6, 0)}, "3 4"},
	} {
		var got []string
		for _, change := range report(t, review, c.filter).Changes {
			got = append(got, change.AuditID)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%+v: %v, not %s", c.filter, got, c.want)
		}
	}
}

func overrideWith(reason string) *auditlog.Event {
	return event("patch  200", "", `{"metadata":{"annotations":{"eni-guard.io/allow-force-delete":"`+reason+`"}}}`, "")
}

// Of several overrides the one counts that was on the pod when it went.
func TestTheLastOverrideBeforeAPodWent(t *testing.T) {
	found := reportOf(t,
		overrideWith("too early"), later(1, event("delete  409", "", forcedBody, "", decidedAs("denied")...)), later(2, overrideWith("first")),
		later(3, overrideWith("second")), later(4, event("delete  200", "", forcedBody, "", decidedAs("overridden")...)), later(5, overrideWith("too late")))
	if then := found.Removals[0].Then; then == nil || then.Override != "second" || then.Decision != "overridden" {
		t.Errorf("%+v", then)
	}
}

// Who tries three times has one stuck pod.
func TestAPodIsStuckOnce(t *testing.T) {
	try := func(at int, uid string) *auditlog.Event {
		annotations := append(decidedAs("denied"), guardPrefix+"verdict=bound", guardPrefix+"pod-uid="+uid)
		return later(at, event("delete  409", "", forcedBody, "", annotations...))
	}
	if totals := reportOf(t, try(1, "u"), try(2, "u"), try(3, "u")).Totals; len(totals.StuckNodes)+len(totals.StuckWorkloads) != 0 {
		t.Errorf("one pod: %+v", totals)
	}
	totals := reportOf(t, try(1, "u"), try(2, "v"), try(3, "u")).Totals
	if want := []Count{{"node-1", 2}}; !slices.Equal(totals.StuckNodes, want) {
		t.Errorf("two pods: %+v", totals.StuckNodes)
	}
	if want := []Count{{"shop/web", 2}}; !slices.Equal(totals.StuckWorkloads, want) {
		t.Errorf("two pods: %+v", totals.StuckWorkloads)
	}
}

// Where nobody could look, a pod that stayed is stuck as far as anybody knows; one that went is not.
func TestAPodThatNobodyCouldAskAbout(t *testing.T) {
	unknown := func(uid, decision, request string) *auditlog.Event {
		return event(request, "", forcedBody, "", append(decidedAs(decision), guardPrefix+"verdict=unknown", guardPrefix+"pod-uid="+uid)...)
	}
	stayed := reportOf(t, later(1, unknown("u", "denied", "delete  409")), later(2, unknown("v", "denied", "delete  409"))).Totals
	if want := []Count{{"node-1", 2}}; !slices.Equal(stayed.StuckNodes, want) {
		t.Errorf("two that stayed: %+v", stayed.StuckNodes)
	}
	went := reportOf(t, later(1, unknown("u", "audited", "delete  200")), later(2, unknown("v", "audited", "delete  200"))).Totals
	if len(went.StuckNodes) > 0 {
		t.Errorf("two that went: %+v", went.StuckNodes)
	}
}

// What became of a pod that is not asked for is not told of another.
func TestWhatBecameOfPodsThatAFilterLeavesOut(t *testing.T) {
	review := New(guard)
	defer review.Close()
	other := event("delete  409", "", forcedBody, "", append(decidedAs("denied"), guardPrefix+"pod=shop/web-1", guardPrefix+"pod-uid=v")...)
	kubelet := event("delete  200", "", `{"preconditions":{"uid":"v"}}`, "")
	kubelet.User = authenticationv1.UserInfo{Username: "system:node:node-1", Groups: []string{"system:nodes"}}
	kubelet.ObjectRef.Name = "web-1"
	for i, e := range []*auditlog.Event{event("delete  409", "", forcedBody, "", decidedAs("denied")...), other, kubelet} {
		if err := review.Add(later(i, e)); err != nil {
			t.Fatal(err)
		}
	}
	for pod, gone := range map[string]bool{"web-0": false, "web-1": true} {
		found := report(t, review, Filter{Pods: []string{pod}}).Removals
		if len(found) != 1 || (found[0].Then != nil) != gone {
			t.Errorf("%s: %+v", pod, found)
		}
	}
}

// The guard's own word about the mode counts more than what the log has of the namespace.
func TestTheModeThatTheGuardHasRecorded(t *testing.T) {
	audit := event("patch  200", "", `{"metadata":{"labels":{"eni-guard.io/mode":"audit"}}}`, "")
	audit.ObjectRef = auditlog.ObjectRef{Resource: "namespaces", Namespace: "shop", Name: "shop"}
	again := event("delete  200", "", forcedBody, "", append(decidedAs("denied"), guardPrefix+"mode=deny")...)
	unasked := event("delete  200", "", forcedBody, pod(markedNow, "", ""))
	found := reportOf(t, later(1, audit), later(2, again), later(3, unasked)).Removals
	if found[0].Mode != "deny" || found[1].Mode != "audit" {
		t.Errorf("the modes are %s and %s", found[0].Mode, found[1].Mode)
	}
}

// A check tells by what is lacking which rule of the audit policy is.
func TestWhatACheckCounts(t *testing.T) {
	kubelet := event("delete  200", "", `{"preconditions":{"uid":"v"}}`, "")
	kubelet.User = authenticationv1.UserInfo{Username: "system:node:node-1", Groups: []string{"system:nodes"}}
	acted := event("delete  200", "", forcedBody, "")
	acted.ImpersonatedUser = &kubelet.User
	whole, cut := event("delete  200", "", forcedBody, ""), event("delete  200", "", "", "", "audit.k8s.io/truncated=true")
	check := NewCheck(guard)
	for i, e := range []*auditlog.Event{kubelet, acted, whole, cut} {
		e.AuditID, e.Level = fmt.Sprint(i), "RequestResponse"
		check.Add(e)
	}
	deletes, kubelets := check.Needs()[0], check.Needs()[1]
	if deletes.Seen != 3 || deletes.Lacking != 1 || deletes.Example != "3" || kubelets.Seen != 1 || kubelets.Lacking != 0 {
		t.Errorf("%+v\n%+v", deletes, kubelets)
	}
}

// An update has the whole object: one that sets what was set already changes nothing about it.
func TestAnUpdateThatRepeatsIsNoChange(t *testing.T) {
	update := func(at int, mode string) *auditlog.Event {
		e := later(at, event("update  200", "", `{"metadata":{"labels":{"eni-guard.io/mode":"`+mode+`"}}}`, ""))
		e.ObjectRef = auditlog.ObjectRef{Resource: "namespaces", Namespace: "shop", Name: "shop"}
		return e
	}
	var got []string
	for _, c := range reportOf(t, update(1, "off"), update(2, "off"), update(3, "deny"), update(4, "off")).Changes {
		got = append(got, c.AuditID)
	}
	if strings.Join(got, " ") != "1 3 4" {
		t.Errorf("the changes are %v", got)
	}
	replaced := func(at int) *auditlog.Event {
		e := later(at, event("update  200", "", `{"kind":"ValidatingWebhookConfiguration","webhooks":[{"name":"force-delete.eni-guard.io","failurePolicy":"Fail"}]}`, ""))
		e.ObjectRef = auditlog.ObjectRef{Resource: "validatingwebhookconfigurations", Name: "eni-guard"}
		return e
	}
	if n := len(reportOf(t, replaced(1), replaced(2)).Changes); n != 2 {
		t.Errorf("of two new configurations %d are told", n)
	}
}

// What was changed before says why the guard was not asked.
func TestWhySomethingSlippedPast(t *testing.T) {
	configuration := func(request, body string) *auditlog.Event {
		e := event(request, "", body, "")
		e.ObjectRef = auditlog.ObjectRef{Resource: "validatingwebhookconfigurations", Name: "eni-guard"}
		return e
	}
	mode := func(mode string) *auditlog.Event {
		e := event("patch  200", "", `{"metadata":{"labels":{"eni-guard.io/mode":`+mode+`}}}`, "")
		e.ObjectRef = auditlog.ObjectRef{Resource: "namespaces", Namespace: "shop", Name: "shop"}
		return e
	}
	all := configuration("deletecollection  200", "")
	all.ObjectRef.Name = ""
	for _, c := range []struct {
		name   string
		before []*auditlog.Event
		want   string
	}{
		{"nothing", nil, ReasonNoTrace},
		{"deleted", []*auditlog.Event{configuration("delete  200", "")}, ReasonConfigurationDeleted},
		{"all deleted", []*auditlog.Event{all}, ReasonConfigurationDeleted},
		{"its webhook taken away", []*auditlog.Event{configuration("patch  200", `{"webhooks":[]}`)}, ReasonConfigurationDeleted},
		{"deleted, and created again", []*auditlog.Event{configuration("delete  200", ""), configuration("create  201", `{"webhooks":[{"name":"force-delete.eni-guard.io","failurePolicy":"Fail"}]}`)}, ReasonNoTrace},
		{"asked about less", []*auditlog.Event{configuration("patch  200", `{"webhooks":[{"name":"force-delete.eni-guard.io","rules":[]}]}`)}, ReasonConfigurationNarrowed},
		{"asked about less, and trusted by another authority", []*auditlog.Event{
			configuration("patch  200", `{"webhooks":[{"name":"force-delete.eni-guard.io","failurePolicy":"Ignore","rules":[]}]}`),
			configuration("patch  200", `[{"op":"add","path":"/webhooks/0/clientConfig/caBundle","value":"eA=="}]`),
		}, ReasonConfigurationNarrowed},
		{"asked about less, and applied again", []*auditlog.Event{
			configuration("patch  200", `{"webhooks":[{"name":"force-delete.eni-guard.io","rules":[]}]}`),
			configuration("patch  200", `{"kind":"ValidatingWebhookConfiguration","webhooks":[{"name":"force-delete.eni-guard.io","failurePolicy":"Fail","rules":[]}]}`),
		}, ReasonNoTrace},
		{"off", []*auditlog.Event{mode(`"off"`)}, "ModeOff"},
		{"off, and no more", []*auditlog.Event{mode(`"off"`), mode("null")}, ReasonNoTrace},
	} {
		t.Run(c.name, func(t *testing.T) {
			events := []*auditlog.Event{later(9, event("delete  200", "", forcedBody, pod(markedNow, "", "")))}
			for i, e := range c.before {
				events = append(events, later(i+1, e))
			}
			if got := reportOf(t, events...).Removals[0].Reason; got != c.want {
				t.Errorf("%s, not %s", got, c.want)
			}
		})
	}
}

// Within the same microsecond, what a removal goes by was there before it.
func TestAChangeCountsForARemovalAtTheSameTime(t *testing.T) {
	for i := range 20 {
		off := event("patch  200", "", `{"metadata":{"labels":{"eni-guard.io/mode":"off"}}}`, "")
		off.ObjectRef = auditlog.ObjectRef{Resource: "namespaces", Namespace: "shop", Name: "shop"}
		removal := event("delete  200", "", forcedBody, pod(markedNow, "", ""))
		off.AuditID, removal.AuditID = fmt.Sprint("a", i), fmt.Sprint("b", i)
		if r := reportOf(t, removal, off).Removals[0]; r.Reason != "ModeOff" {
			t.Fatalf("it is %s", r.Reason)
		}
	}
}
