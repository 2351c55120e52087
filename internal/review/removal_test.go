package review

import (
	"fmt"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"

	"github.com/eni-guard/eni-guard/internal/auditlog"
	"github.com/eni-guard/eni-guard/webhook"
)

// event is a request about the pod shop/web-0, as "VERB SUBRESOURCE CODE", with its query, body, answer and annotations.
func event(request, query, body, answer string, annotations ...string) *auditlog.Event {
	fields := strings.Split(request, " ")
	e := &auditlog.Event{
		AuditID: "1", Stage: auditlog.StageResponseComplete, RequestURI: "/api/v1/namespaces/shop/pods/web-0" + query, Verb: fields[0],
		User: authenticationv1.UserInfo{Username: "jo"}, RequestObject: []byte(body), ResponseObject: []byte(answer), Received: time.Unix(1, 0),
		ObjectRef: auditlog.ObjectRef{Resource: "pods", Namespace: "shop", Name: "web-0", Subresource: fields[1]}, Annotations: map[string]string{},
	}
	_, _ = fmt.Sscan(fields[2], &e.ResponseStatus.Code)
	for _, annotation := range annotations {
		key, value, _ := strings.Cut(annotation, "=")
		e.Annotations[key] = value
	}
	return e
}

// pod is the pod in an answer.
func pod(metadata, spec, status string) string {
	return `{"kind":"Pod","metadata":{"namespace":"shop","name":"web-0","uid":"u"` + metadata + `},"spec":{"nodeName":"node-1"` + spec + `},"status":{"phase":"Running","podIPs":[{"ip":"10.0.0.1"}]` + status + `}}`
}

// marks as the API server makes them in the answer to a delete.
const (
	markedNow  = `,"deletionTimestamp":"2026-11-25T01:02:03Z","deletionGracePeriodSeconds":0`
	markedSoon = `,"deletionTimestamp":"2026-11-25T01:02:03Z","deletionGracePeriodSeconds":30`
	failedOpen = failedOpenPrefix + "round_0_index_0=" + webhookName
)

func TestWhatIsAForcedRemoval(t *testing.T) {
	const (
		force    = `{"gracePeriodSeconds":0}`
		asked    = `{"gracePeriodSeconds":30}`
		dry      = `{"gracePeriodSeconds":0,"dryRun":["All"]}`
		evicted  = `{"deleteOptions":{"gracePeriodSeconds":0}}`
		labelled = `{"metadata":{"labels":{"k8s.aliyun.com/ignore-by-terway":"true"}}}`
		freed    = `{"metadata":{"$deleteFromPrimitiveList/finalizers":["eni-guard.io/sandbox-in-use"]}}`
		guardHas = "force-delete.eni-guard.io/decision="
	)
	notCalled := event("delete  500", "", force, "")
	notCalled.ResponseStatus.Message = `Internal error occurred: failed calling webhook "force-delete.eni-guard.io": connection refused`
	otherWebhook := event("delete  500", "", force, "")
	otherWebhook.ResponseStatus.Message = `Internal error occurred: failed calling webhook "validate.example.com": connection refused`
	byKubelet := func(e *auditlog.Event) *auditlog.Event {
		e.User = authenticationv1.UserInfo{Username: "system:node:node-1", Groups: []string{"system:nodes"}}
		return e
	}
	asKubelet := func(e *auditlog.Event) *auditlog.Event {
		e.ImpersonatedUser = &authenticationv1.UserInfo{Username: "system:node:node-1", Groups: []string{"system:nodes"}}
		return e
	}
	asTheGuard := event("patch  200", "", freed, "")
	asTheGuard.ImpersonatedUser = &authenticationv1.UserInfo{Username: "system:serviceaccount:eni-guard:eni-guard-webhook"}
	const refuses, evidence = `admission webhook "force-delete.eni-guard.io" denied the request: `, "pod shop/web-0 is still alive on node node-2"
	// first is a request about which the log has the guard's first word, and whose answer tells the last.
	first := func(decision, code, message string, annotations ...string) *auditlog.Event {
		e := event("delete  "+code, "", force, "", append(annotations, guardHas+decision, guardPrefix+"reason=First", guardPrefix+"path=delete",
			guardPrefix+"node=node-2", guardPrefix+"verdict=released", guardPrefix+"override-reason=smoke")...)
		e.ResponseStatus.Message = message
		return e
	}
	labelUnanswered := event("patch  500", "", labelled, "")
	labelUnanswered.ResponseStatus.Message = notCalled.ResponseStatus.Message
	others := event("delete  200", "", force, "")
	others.ObjectRef.APIGroup = "example.com"
	likeAKubelet := event("delete  200", "", force, "")
	likeAKubelet.User.Username = "system:node:node-1"
	ours := event("delete  200", "", force, strings.Replace(pod(markedNow, "", ""), "shop", "eni-guard", 1))
	ours.ObjectRef.Namespace = "eni-guard"
	byTheGuard := event("patch  200", "", freed, "")
	byTheGuard.User.Username = "system:serviceaccount:eni-guard:eni-guard-webhook"
	for _, c := range []struct {
		name  string
		event *auditlog.Event
		// want is "PATH DECISION REASON NODE" of each row.
		want   string
		untold Untold
	}{
		{"forced", event("delete  200", "", force, pod(markedNow, "", "")), "delete slipped-past NoTrace node-1", Untold{}},
		{"forced by the address", event("delete  200", "?gracePeriodSeconds=0", "", pod(markedNow, "", "")), "delete slipped-past NoTrace node-1", Untold{}},
		{"the body counts, not the address", event("delete  200", "?gracePeriodSeconds=0", asked, pod(markedSoon, "", "")), "", Untold{}},
		{"forced, and only the address is on record", event("delete  200", "?gracePeriodSeconds=0", "", ""), "delete slipped-past NoTrace ", Untold{}},
		{"forced, and the answer is not on record", event("delete  200", "", force, ""), "delete slipped-past NoTrace ", Untold{}},
		{"graceful", event("delete  200", "", asked, pod(markedSoon, "", "")), "", Untold{}},
		{"graceful, of a pod without time", event("delete  200", "", "{}", pod(markedNow, "", "")), "delete slipped-past NoTrace node-1", Untold{}},
		{"graceful, of a pod that has ended", event("delete  200", "", "{}", pod(markedNow, "", `,"phase":"Succeeded"`)), "delete slipped-past NoTrace node-1", Untold{}},
		{"again, of a pod that is terminating", event("delete  200", "", "{}", pod(markedSoon, "", "")), "", Untold{}},
		{"nothing but metadata", event("delete  200", "", "", ""), "", Untold{Deletes: 1}},
		{"a body, and no answer", event("delete  200", "", asked, ""), "", Untold{Deletes: 1}},
		{"dry run in the body", event("delete  200", "", dry, pod(markedNow, "", "")), "", Untold{}},
		{"dry run in the address", event("delete  200", "?gracePeriodSeconds=0&dryRun=All", "", pod(markedNow, "", "")), "", Untold{}},
		{"no such pod", event("delete  404", "", force, ""), "", Untold{}},
		{"no right", event("delete  403", "", force, ""), "", Untold{}},
		{"given up by the API server", event("delete  504", "", force, ""), "", Untold{Deletes: 1}},
		{"an eviction, given up by the API server", event("create eviction 504", "", evicted, ""), "", Untold{Evictions: 1}},
		{"a collection, given up by the API server", event("deletecollection  504", "", force, ""), "", Untold{Collections: 1}},
		{"a label, given up by the API server", event("patch  504", "", labelled, ""), "", Untold{}},
		{"on the host's network", event("delete  200", "", force, pod(markedNow, `,"hostNetwork":true`, "")), "delete exempt HostNetwork node-1", Untold{}},
		{"a mirror pod", event("delete  200", "", force, pod(markedNow+`,"annotations":{"kubernetes.io/config.mirror":"x"}`, "", "")), "delete exempt MirrorPod node-1", Untold{}},
		{"never scheduled", event("delete  200", "", force, strings.Replace(pod(markedNow, "", ""), "node-1", "", 1)), "delete exempt NotScheduled ", Untold{}},
		{"in the guard's namespace", ours, "delete exempt GuardNamespace node-1", Untold{}},
		{"by a kubelet", byKubelet(event("delete  200", "", force, "")), "", Untold{}},
		{"by somebody who acts as the kubelet", asKubelet(event("delete  200", "", force, pod(markedNow, "", ""))), "delete slipped-past Impersonated node-1", Untold{}},
		{"by somebody who acts as the kubelet, and the pod has no network of its own", asKubelet(event("delete  200", "", force, pod(markedNow, `,"hostNetwork":true`, ""))), "delete exempt HostNetwork node-1", Untold{}},
		{"by somebody who acts as the kubelet, where the guard is asked about all", asKubelet(event("delete  200", "", force, "", guardHas+"exempt", guardPrefix+"reason=OwnKubelet", guardPrefix+"path=delete")), "delete slipped-past Impersonated ", Untold{}},
		{"gracefully, by somebody who acts as the kubelet", asKubelet(event("delete  200", "", asked, pod(markedSoon, "", ""))), "", Untold{}},
		{"by somebody who is called like a kubelet", likeAKubelet, "delete slipped-past NoTrace ", Untold{}},
		{"no webhook, Fail", notCalled, "delete unanswered WebhookDown ", Untold{}},
		{"no webhook of somebody else", otherWebhook, "", Untold{}},
		{"no webhook, Ignore", event("delete  200", "", force, pod(markedNow, "", ""), failedOpen), "delete slipped-past WebhookDown node-1", Untold{}},
		{"no webhook, Ignore, of somebody else", event("delete  200", "", force, pod(markedNow, "", ""), failedOpenPrefix+"round_0_index_0=validate.example.com"), "delete slipped-past NoTrace node-1", Untold{}},
		{"no webhook, an override", event("delete  200", "", force, pod(markedNow, "", ""), failedOpen, policyReason+"=fire"), "delete overridden Override node-1", Untold{}},
		{"decided", event("delete  409", "", force, "", guardHas+"denied", guardPrefix+"reason=SandboxBound", guardPrefix+"path=delete", guardPrefix+"node=node-2"), "delete denied SandboxBound node-2", Untold{}},
		{"refused, and let through when asked again", first("denied", "200", ""), "delete allowed AskedAgain node-2", Untold{}},
		{"refused, and overridden when asked again", first("denied", "200", "", policyReason+"=fire"), "delete overridden Override node-2", Untold{}},
		{"held, and overridden when asked again", first("held", "200", "", policyReason+"=fire"), "delete overridden Override node-2", Untold{}},
		{"recorded, and overridden when asked again", first("audited", "200", "", policyReason+"=fire"), "delete overridden Override node-2", Untold{}},
		{"exempt, with an override that nobody needs", first("exempt", "200", "", policyReason+"=fire"), "delete exempt First node-2", Untold{}},
		{"refused, and no webhook when asked again, Ignore", first("denied", "200", "", failedOpen), "delete slipped-past WebhookDown node-2", Untold{}},
		{"refused, and no webhook when asked again, Fail", first("denied", "500", notCalled.ResponseStatus.Message), "delete unanswered WebhookDown node-2", Untold{}},
		{"let through, and refused when asked again", first("overridden", "409", refuses+evidence), "delete denied AskedAgain node-2", Untold{}},
		{"let through, and then no webhook: it may be marked", first("audited", "500", notCalled.ResponseStatus.Message), "delete audited First node-2", Untold{}},
		{"let through, and refused by the webhook of somebody else", first("allowed", "409", `admission webhook "validate.example.com" denied the request: no`), "delete allowed First node-2", Untold{}},
		{"by a kubelet, where the guard is asked about all", byKubelet(event("delete  200", "", force, "", guardHas+"exempt", guardPrefix+"reason=OwnKubelet", guardPrefix+"path=delete")), "", Untold{}},
		{"decided, in dry run", event("delete  409", "", dry, "", guardHas+"denied", guardPrefix+"reason=SandboxBound"), "", Untold{}},
		{"decided to be none", event("create eviction 201", "", "{}", "", guardHas+"exempt", guardPrefix+"reason=NotForced"), "", Untold{}},
		{"an eviction", event("create eviction 201", "", evicted, ""), "eviction slipped-past NoTrace ", Untold{}},
		{"an eviction in dry run", event("create eviction 201", "", `{"deleteOptions":{"gracePeriodSeconds":0,"dryRun":["All"]}}`, ""), "", Untold{}},
		{"a graceful eviction", event("create eviction 201", "", "{}", ""), "", Untold{Evictions: 1}},
		{"an eviction, metadata", event("create eviction 201", "", "", ""), "", Untold{Evictions: 1}},
		{"a collection", event("deletecollection  200", "", force, `{"kind":"PodList","items":[`+pod("", "", "")+","+pod("", `,"hostNetwork":true`, "")+"]}"), "collection slipped-past NoTrace node-1; collection exempt HostNetwork node-1", Untold{}},
		{"a graceful collection", event("deletecollection  200", "", "{}", `{"kind":"PodList","items":[`+pod("", `,"terminationGracePeriodSeconds":30`, "")+","+pod("", `,"terminationGracePeriodSeconds":0`, "")+"]}"), "collection slipped-past NoTrace node-1", Untold{}},
		{"a collection without its answer", event("deletecollection  200", "", force, ""), "", Untold{Collections: 1}},
		{"a collection, decided", event("deletecollection  409", "", force, "", guardPrefix+`pod.u={"decision":"denied","path":"collection","pod-uid":"u","pod":"shop/web-0","reason":"SandboxBound","node":"node-1"}`), "collection denied SandboxBound node-1", Untold{}},
		{"a collection that went through after it was refused at a pod", event("deletecollection  200", "", force, "", guardPrefix+`pod.u={"decision":"denied","path":"collection","pod-uid":"u","pod":"shop/web-0","reason":"SandboxBound","node":"node-1"}`), "collection allowed AskedAgain node-1", Untold{Collections: 1}},
		{"a collection that was overridden after it was refused at a pod", event("deletecollection  200", "", force, "", policyReason+"=fire", guardPrefix+`pod.u={"decision":"denied","path":"collection","pod-uid":"u","pod":"shop/web-0","reason":"SandboxBound","node":"node-1"}`), "collection overridden Override node-1", Untold{Collections: 1}},
		{"a collection that went through without a webhook after it was refused at a pod", event("deletecollection  200", "", force, "", failedOpen, guardPrefix+`pod.u={"decision":"denied","path":"collection","pod-uid":"u","pod":"shop/web-0","reason":"SandboxBound","node":"node-1"}`), "collection slipped-past WebhookDown node-1", Untold{Collections: 1}},
		{"a collection, a record that is cut off", event("deletecollection  200", "", force, "", guardPrefix+`pod.u={"decision":"den`), "", Untold{Records: 1, Collections: 1}},
		{"the label", event("patch  200", "", labelled, ""), "ignore-label slipped-past NoTrace ", Untold{}},
		{"the label, as a JSON patch", event("patch  200", "", `[{"op":"add","path":"/metadata/labels/k8s.aliyun.com~1ignore-by-terway","value":"true"}]`, ""), "ignore-label slipped-past NoTrace ", Untold{}},
		{"the label, copied", event("patch  200", "", `[{"op":"copy","from":"/metadata/labels/a","path":"/metadata/labels/k8s.aliyun.com~1ignore-by-terway"}]`, ""), "ignore-label slipped-past NoTrace ", Untold{}},
		{"the label, in a whole object", event("update  200", "", labelled, ""), "", Untold{}},
		{"the label, in a whole object, and no webhook", event("update  200", "", labelled, "", failedOpen), "ignore-label slipped-past WebhookDown ", Untold{}},
		{"the label, and no webhook", labelUnanswered, "ignore-label unanswered WebhookDown ", Untold{}},
		{"the label, refused", event("patch  500", "", labelled, ""), "", Untold{}},
		{"the finalizer", event("patch  200", "", freed, ""), "finalizer slipped-past NoTrace ", Untold{}},
		{"the finalizer, by its number, after a test", event("patch  200", "", `[{"op":"test","path":"/metadata/finalizers/0","value":"eni-guard.io/sandbox-in-use"},{"op":"remove","path":"/metadata/finalizers/0"}]`, ""), "finalizer slipped-past NoTrace ", Untold{}},
		{"another finalizer, beside the guard's", event("patch  200", "", `{"metadata":{"$deleteFromPrimitiveList/finalizers":["example.com/x"],"$setElementOrder/finalizers":["eni-guard.io/sandbox-in-use"]}}`, ""), "", Untold{}},
		{"all finalizers but the guard's", event("patch  200", "", `{"metadata":{"finalizers":["eni-guard.io/sandbox-in-use"]}}`, ""), "", Untold{}},
		{"all finalizers but the guard's, as a JSON patch", event("patch  200", "", `[{"op":"replace","path":"/metadata/finalizers","value":["eni-guard.io/sandbox-in-use"]}]`, ""), "", Untold{}},
		{"the finalizer, by the guard", byTheGuard, "", Untold{}},
		{"the finalizer, by somebody who acts as the guard", asTheGuard, "finalizer slipped-past Impersonated ", Untold{}},
		{"the finalizer, by its number, with an override", event("patch  200", "", `[{"op":"remove","path":"/metadata/finalizers/0"}]`, "", failedOpen, policyReason+"=fire"), "finalizer overridden Override ", Untold{}},
		{"a phase, and no webhook", event("patch status 200", "", `{"status":{"phase":"Failed"}}`, "", failedOpen), "", Untold{}},
		{"another label", event("patch  200", "", `{"metadata":{"labels":{"app":"web"}}}`, ""), "", Untold{}},
		{"something else that is called pods", others, "", Untold{}},
		{"a binding", event("create binding 201", "", "{}", ""), "", Untold{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var untold Untold
			var got []string
			for _, r := range guard.removalsOf(c.event, &untold) {
				got = append(got, fmt.Sprintf("%s %s %s %s", r.Path, r.Decision, r.Reason, r.Node))
				if r.User != c.event.Actor().Username || r.Namespace != c.event.ObjectRef.Namespace || r.Pod != "web-0" {
					t.Errorf("the row is %+v", r)
				}
				// What the log has of the guard is its first word.
				if r.Reason == ReasonAskedAgain && r.Decision == Decision(webhook.Denied) && (r.OverrideReason != "" || r.Evidence != evidence || r.Verdict != "bound") {
					t.Errorf("of what was refused after all it tells the override %q, the evidence %q, the verdict %s", r.OverrideReason, r.Evidence, r.Verdict)
				}
			}
			if got := strings.Join(got, "; "); got != c.want || untold != c.untold {
				t.Errorf("%q, not %q; untold %+v, not %+v", got, c.want, untold, c.untold)
			}
		})
	}
}

func TestChanges(t *testing.T) {
	on := func(e *auditlog.Event, resource, namespace, name string) *auditlog.Event {
		e.ObjectRef = auditlog.ObjectRef{Resource: resource, Namespace: namespace, Name: name, Subresource: e.ObjectRef.Subresource}
		return e
	}
	const hooks = "validatingwebhookconfigurations"
	for _, c := range []struct {
		name  string
		event *auditlog.Event
		// want is "KIND: OBJECT: WHAT", and ends with an exclamation mark if the guard is weaker now.
		want string
	}{
		{"off", on(event("patch  200", "", `{"metadata":{"labels":{"eni-guard.io/mode":"off"}}}`, ""), "namespaces", "shop", "shop"), "mode: namespace shop: mode off!"},
		{"off, as a JSON patch", on(event("patch  200", "", `[{"op":"replace","path":"/metadata/labels/eni-guard.io~1mode","value":"off"}]`, ""), "namespaces", "shop", "shop"), "mode: namespace shop: mode off!"},
		{"deny", on(event("create  201", "", `{"metadata":{"labels":{"eni-guard.io/mode":"deny"}}}`, ""), "namespaces", "shop", "shop"), "mode: namespace shop: mode deny"},
		{"no label any more", on(event("patch  200", "", `{"metadata":{"labels":{"eni-guard.io/mode":null}}}`, ""), "namespaces", "shop", "shop"), "mode: namespace shop: label of the mode taken away"},
		{"no label any more, as a JSON patch", on(event("patch  200", "", `[{"op":"remove","path":"/metadata/labels/eni-guard.io~1mode"}]`, ""), "namespaces", "shop", "shop"), "mode: namespace shop: label of the mode taken away"},
		{"in dry run", on(event("patch  200", "?dryRun=All", `{"metadata":{"labels":{"eni-guard.io/mode":"off"}}}`, ""), "namespaces", "shop", "shop"), ""},
		{"refused", on(event("patch  403", "", `{"metadata":{"labels":{"eni-guard.io/mode":"off"}}}`, ""), "namespaces", "shop", "shop"), ""},
		{"override", event("patch  200", "", `{"metadata":{"annotations":{"eni-guard.io/allow-force-delete":"fire","eni-guard.io/allow-force-delete-until":"2026-12-24T18:00:00Z"}}}`, ""), `override: pod shop/web-0: override: "fire" until 2026-12-24T18:00:00Z!`},
		{"no override any more", event("patch  200", "", `{"metadata":{"annotations":{"eni-guard.io/allow-force-delete":null}}}`, ""), "override: pod shop/web-0: override taken away"},
		{"Ignore", on(event("patch  200", "", `[{"op":"replace","path":"/webhooks/0/failurePolicy","value":"Ignore"}]`, ""), hooks, "", "eni-guard"), "configuration: validatingwebhookconfiguration eni-guard: changed, failurePolicy Ignore!"},
		{"the one that always fails open", on(event("update  200", "", `{"webhooks":[{"name":"force-delete.eni-guard.io","failurePolicy":"Ignore"}]}`, ""), hooks, "", "eni-guard-failing-open"), "configuration: validatingwebhookconfiguration eni-guard-failing-open: changed"},
		{"deleted, metadata", on(event("delete  200", "", "", ""), hooks, "", "eni-guard"), "configuration: validatingwebhookconfiguration eni-guard: deleted!"},
		{"changed, metadata", on(event("patch  200", "", "", ""), hooks, "", "eni-guard"), "configuration: validatingwebhookconfiguration eni-guard: changed, to what is not on record"},
		{"somebody else's", on(event("delete  200", "", "", ""), hooks, "", "cert-manager"), ""},
		{"the guard's by another name", on(event("create  201", "", `{"webhooks":[{"name":"force-delete.eni-guard.io","failurePolicy":"Fail"}]}`, ""), hooks, "", "mine"), "configuration: validatingwebhookconfiguration mine: created, failurePolicy Fail"},
		{"the policy", on(event("delete  200", "", "", ""), "validatingadmissionpolicies", "", "override.eni-guard.io"), "configuration: validatingadmissionpolicy override.eni-guard.io: deleted!"},
		{"no replicas", on(event("patch scale 200", "", `{"spec":{"replicas":0}}`, ""), "deployments", "eni-guard", "eni-guard-webhook"), "workload: deployment eni-guard/eni-guard-webhook: replicas 0!"},
		{"what a controller has counted", on(event("update status 200", "", `{"spec":{"replicas":0}}`, ""), "deployments", "eni-guard", "eni-guard-webhook"), ""},
		{"an agent less", on(event("delete  200", "", "", ""), "daemonsets", "eni-guard", "eni-guard-agent"), "workload: daemonset eni-guard/eni-guard-agent: deleted!"},
		{"somebody else's workload", on(event("patch scale 200", "", `{"spec":{"replicas":0}}`, ""), "deployments", "shop", "eni-guard-webhook"), ""},
		{"the node", on(event("delete  200", "", "", ""), "nodes", "", "node-1"), "node: node node-1: deleted!"},
		{"the taint", on(event("patch  200", "", `{"spec":{"taints":[{"key":"node.kubernetes.io/out-of-service","effect":"NoExecute"}]}}`, ""), "nodes", "", "node-1"), "node: node node-1: taint node.kubernetes.io/out-of-service!"},
		{"the taint taken away", on(event("patch  200", "", `{"spec":{"taints":[{"$patch":"delete","key":"node.kubernetes.io/out-of-service","effect":"NoExecute"}]}}`, ""), "nodes", "", "node-1"), ""},
		{"the label of a node", on(event("patch  200", "", `{"metadata":{"labels":{"type":"virtual-kubelet"}}}`, ""), "nodes", "", "node-1"), "node: node node-1: label type=virtual-kubelet!"},
		{"all nodes", on(event("deletecollection  200", "", "", ""), "nodes", "", ""), "node: node (all, or those of a selector): deleted!"},
		{"all configurations", on(event("deletecollection  200", "", "", ""), hooks, "", ""), "configuration: validatingwebhookconfiguration (all, or those of a selector): deleted!"},
		{"the guard's workloads", on(event("deletecollection  200", "", "", ""), "deployments", "eni-guard", ""), "workload: deployment eni-guard/(all, or those of a selector): deleted!"},
		{"the guard's namespace", on(event("delete  200", "", "", ""), "namespaces", "eni-guard", "eni-guard"), "workload: namespace eni-guard: deleted, with all of the guard!"},
		{"somebody else's namespace", on(event("delete  200", "", "", ""), "namespaces", "shop", "shop"), ""},
		{"a webhook taken away", on(event("patch  200", "", `[{"op":"remove","path":"/webhooks/0"}]`, ""), hooks, "", "eni-guard"), "configuration: validatingwebhookconfiguration eni-guard: changed, a webhook taken away!"},
		{"all webhooks taken away", on(event("patch  200", "", `{"webhooks":null}`, ""), hooks, "", "eni-guard"), "configuration: validatingwebhookconfiguration eni-guard: changed, a webhook taken away!"},
		{"all webhooks taken away, as a JSON patch", on(event("patch  200", "", `[{"op":"remove","path":"/webhooks"}]`, ""), hooks, "", "eni-guard"), "configuration: validatingwebhookconfiguration eni-guard: changed, a webhook taken away!"},
		{"all webhooks taken away, in a whole object", on(event("update  200", "", `{"kind":"ValidatingWebhookConfiguration","webhooks":[]}`, ""), hooks, "", "eni-guard"), "configuration: validatingwebhookconfiguration eni-guard: changed, a webhook taken away!"},
		{"a webhook taken away, as kubectl edit does", on(event("patch  200", "", `{"webhooks":[{"$patch":"delete","name":"force-delete.eni-guard.io"}]}`, ""), hooks, "", "eni-guard"), "configuration: validatingwebhookconfiguration eni-guard: changed, a webhook taken away!"},
		{"narrowed, as kubectl edit does", on(event("patch  200", "", `{"webhooks":[{"name":"force-delete.eni-guard.io","namespaceSelector":{"matchLabels":{"a":"b"}}}]}`, ""), hooks, "", "eni-guard"), "configuration: validatingwebhookconfiguration eni-guard: changed, what it is asked about: namespaceSelector!"},
		{"narrowed, as a JSON patch", on(event("patch  200", "", `[{"op":"add","path":"/webhooks/0/matchConditions/-","value":{"name":"never","expression":"false"}},{"op":"remove","path":"/webhooks/0/rules/0"}]`, ""), hooks, "", "eni-guard"), "configuration: validatingwebhookconfiguration eni-guard: changed, what it is asked about: matchConditions, what it is asked about: rules!"},
		{"somebody else is asked", on(event("patch  200", "", `{"webhooks":[{"name":"force-delete.eni-guard.io","clientConfig":{"service":{"name":"mine"}}}]}`, ""), hooks, "", "eni-guard"), "configuration: validatingwebhookconfiguration eni-guard: changed, what it is asked about: clientConfig.service!"},
		{"a new authority", on(event("patch  200", "", `[{"op":"add","path":"/webhooks/0/clientConfig/caBundle","value":"eA=="}]`, ""), hooks, "", "eni-guard"), "configuration: validatingwebhookconfiguration eni-guard: changed"},
		{"as Helm applies it", on(event("patch  200", "", `{"kind":"ValidatingWebhookConfiguration","webhooks":[{"name":"force-delete.eni-guard.io","failurePolicy":"Fail","namespaceSelector":{}}]}`, ""), hooks, "", "eni-guard"), "configuration: validatingwebhookconfiguration eni-guard: changed, failurePolicy Fail"},
		{"Ignore, and something else after it", on(event("patch  200", "", `[{"op":"replace","path":"/webhooks/0/failurePolicy","value":"Ignore"},{"op":"replace","path":"/webhooks/0/timeoutSeconds","value":5}]`, ""), hooks, "", "eni-guard"), "configuration: validatingwebhookconfiguration eni-guard: changed, failurePolicy Ignore!"},
		{"the whole document", on(event("patch  200", "", `[{"op":"replace","path":"","value":{"metadata":{"labels":{"eni-guard.io/mode":"off"}}}}]`, ""), "namespaces", "shop", "shop"), "mode: namespace shop: mode off!"},
		{"copied from elsewhere", on(event("patch  200", "", `[{"op":"copy","from":"/metadata/annotations/a","path":"/metadata/labels/eni-guard.io~1mode"}]`, ""), "namespaces", "shop", "shop"), "mode: namespace shop: mode copied from /metadata/annotations/a!"},
		{"only tested for", on(event("patch  200", "", `[{"op":"test","path":"/metadata/labels/eni-guard.io~1mode","value":"off"}]`, ""), "namespaces", "shop", "shop"), ""},
		{"the right, bound", on(event("create  201", "", `{"roleRef":{"name":"eni-guard-override"},"subjects":[{"kind":"User","name":"jo"},{"kind":"ServiceAccount","namespace":"ci","name":"bot"}]}`, ""), "clusterrolebindings", "", "oncall"), "right: clusterrolebinding oncall: the right to override for User jo, ServiceAccount ci bot!"},
		{"the right, bound to one more", on(event("patch  200", "", `[{"op":"add","path":"/subjects/-","value":{"kind":"User","name":"mo"}}]`, `{"roleRef":{"name":"eni-guard-override"},"subjects":[{"kind":"User","name":"jo"},{"kind":"User","name":"mo"}]}`), "rolebindings", "shop", "oncall"), "right: rolebinding shop/oncall: the right to override for User jo, User mo!"},
		{"the right, bound by a name that the API server makes", on(event("create  201", "", `{"metadata":{"generateName":"oncall-"},"roleRef":{"name":"eni-guard-override"},"subjects":[{"kind":"User","name":"jo"}]}`, `{"metadata":{"name":"oncall-x2v4z"},"roleRef":{"name":"eni-guard-override"},"subjects":[{"kind":"User","name":"jo"}]}`), "rolebindings", "shop", ""), "right: rolebinding shop/oncall-x2v4z: the right to override for User jo!"},
		{"the right, in a role of somebody's own", on(event("create  201", "", `{"rules":[{"apiGroups":["eni-guard.io"],"resources":["forcedeletes"],"verbs":["override"]}]}`, ""), "roles", "shop", "ops"), "right: role shop/ops: has the right to override!"},
		{"the right, in a role with all of the group", on(event("create  201", "", `{"rules":[{"apiGroups":["eni-guard.io"],"resources":["*"],"verbs":["*"]}]}`, ""), "clusterroles", "", "ops"), "right: clusterrole ops: has the right to override!"},
		{"every right", on(event("create  201", "", `{"rules":[{"apiGroups":["*"],"resources":["*"],"verbs":["*"]}]}`, ""), "clusterroles", "", "root"), ""},
		{"another verb", on(event("create  201", "", `{"rules":[{"apiGroups":["eni-guard.io"],"resources":["forcedeletes"],"verbs":["get"]}]}`, ""), "clusterroles", "", "ops"), ""},
		{"two rules that make none", on(event("create  201", "", `{"rules":[{"apiGroups":["eni-guard.io"],"resources":["x"],"verbs":["*"]},{"apiGroups":["apps"],"resources":["*"],"verbs":["*"]}]}`, ""), "clusterroles", "", "ops"), ""},
		{"the chart's own role", on(event("create  201", "", `{"rules":[{"apiGroups":["eni-guard.io"],"resources":["forcedeletes"],"verbs":["override"]}]}`, ""), "clusterroles", "", "eni-guard-override"), "right: clusterrole eni-guard-override: created"},
		{"what the guard may do", on(event("delete  200", "", "", ""), "clusterroles", "", "eni-guard-webhook"), "right: clusterrole eni-guard-webhook: deleted!"},
		{"another role", on(event("update  200", "", `{"rules":[{"resources":["pods"],"verbs":["get"]}]}`, ""), "roles", "shop", "ops"), ""},
		{"all roles of a namespace that goes", on(event("deletecollection  200", "", "", ""), "roles", "shop", ""), ""},
		{"two finalizers by their numbers", event("patch  200", "", `[{"op":"remove","path":"/metadata/finalizers/0"},{"op":"remove","path":"/metadata/finalizers/0"}]`, ""), "finalizers: pod shop/web-0: finalizers taken away!"},
		{"all finalizers", event("patch  200", "", `{"metadata":{"finalizers":null}}`, ""), "finalizers: pod shop/web-0: finalizers taken away!"},
		{"somebody else's finalizer", event("patch  200", "", `{"metadata":{"$deleteFromPrimitiveList/finalizers":["batch.kubernetes.io/job-tracking"]}}`, ""), ""},
		{"off, and what looks like dry run", on(event("patch  200", "?fieldManager=dryRun=All", `{"dryRun":["All"],"metadata":{"labels":{"eni-guard.io/mode":"off"}}}`, ""), "namespaces", "shop", "shop"), "mode: namespace shop: mode off!"},
		{"the taint, and another after it", on(event("patch  200", "", `[{"op":"add","path":"/spec/taints/-","value":{"key":"node.kubernetes.io/out-of-service"}},{"op":"add","path":"/spec/taints/-","value":{"key":"mine"}}]`, ""), "nodes", "", "node-1"), "node: node node-1: taint node.kubernetes.io/out-of-service!"},
		{"another taint", on(event("patch  200", "", `{"spec":{"taints":[{"key":"mine","effect":"NoExecute"}]}}`, ""), "nodes", "", "node-1"), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := ""
			if change, ok := guard.changeOf(c.event); ok {
				got = fmt.Sprintf("%s: %s: %s", change.Kind, change.Object, change.What)
				if change.Weakens {
					got += "!"
				}
			}
			if got != c.want {
				t.Errorf("%q, not %q", got, c.want)
			}
		})
	}
}

func TestWorkloadsByTheNamesOfTheirPods(t *testing.T) {
	for pod, want := range map[string]string{
		"web-7d9f8b6c5d-x2v4z": "web", "payment-0": "payment", "payment-12": "payment", "agent-x2v4z": "agent", "job-3-x2v4z": "job",
		"web": "web", "my-shop": "my-shop", "etcd-node-1": "etcd-node",
	} {
		if got := Workload(pod); got != want {
			t.Errorf("%s: %s, not %s", pod, got, want)
		}
	}
}
