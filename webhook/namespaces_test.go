package webhook

import (
	"strings"
	"testing"

	"github.com/go-logr/logr/funcr"
	"k8s.io/client-go/tools/events"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/client/fake"
	"sigs.k8s.io/controller-runtime/pkg/reconcile"
)

func TestALabelThatIsNoModeIsReported(t *testing.T) {
	for value, want := range map[string]string{
		"":      "",
		"deny":  "",
		"off":   "",
		"denny": `Warning InvalidMode label eni-guard.io/mode: "denny" is not a mode: use deny, hold, audit or off; until then the default is in force here: hold`,
		"Off":   `Warning InvalidMode label eni-guard.io/mode: "Off" is not a mode: use deny, hold, audit or off; until then the default is in force here: hold`,
	} {
		recorder, lines := events.NewFakeRecorder(2), 0
		c := &namespaceController{
			namespaces: fake.NewClientBuilder().WithObjects(shop(value)).Build(), events: recorder, defaultMode: ModeHold,
			log: funcr.New(func(string, string) { lines++ }, funcr.Options{}),
		}
		if _, err := c.Reconcile(t.Context(), reconcile.Request{NamespacedName: client.ObjectKey{Name: "shop"}}); err != nil {
			t.Fatal(err)
		}
		got := ""
		if len(recorder.Events) == 1 {
			got = <-recorder.Events
		}
		if strings.TrimSpace(got) != want || (lines == 1) != (want != "") {
			t.Errorf("%q: %d lines, Event %q", value, lines, got)
		}
	}
	c := &namespaceController{namespaces: fake.NewClientBuilder().Build()}
	if _, err := c.Reconcile(t.Context(), reconcile.Request{NamespacedName: client.ObjectKey{Name: "gone"}}); err != nil {
		t.Errorf("a namespace that is gone: %v", err)
	}
}
