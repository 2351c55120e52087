{{- /*
What the API server sends to the webhook, as CEL. Each definition is one expression; the test conformance_test.go of the
webhook holds them against the rule in Go (webhook/rule.go) and against what real API servers do.
*/ -}}

{{- define "eni-guard.hasMatchConditions" -}}
{{- if semverCompare ">=1.30.0-0" .Capabilities.KubeVersion.Version }}true{{ end -}}
{{- end -}}

{{- /* A DELETE that takes the object out of the API server without a word from its kubelet: effectOn in webhook/rule.go. */ -}}
{{- define "eni-guard.removesNow" -}}
(has(oldObject.metadata.deletionTimestamp)
? (!has(oldObject.metadata.deletionGracePeriodSeconds) || oldObject.metadata.deletionGracePeriodSeconds == 0 ||
(has(request.options.gracePeriodSeconds) && request.options.gracePeriodSeconds == 0))
: (!has(oldObject.spec.nodeName) || oldObject.spec.nodeName == '' ||
(has(oldObject.status.phase) && oldObject.status.phase in ['Failed', 'Succeeded']) ||
(has(request.options.gracePeriodSeconds) ? request.options.gracePeriodSeconds == 0
: (!has(oldObject.spec.terminationGracePeriodSeconds) || oldObject.spec.terminationGracePeriodSeconds == 0))))
{{- end -}}

{{- /* The kubelet deletes a pod of its own node only after the sandbox is gone. */ -}}
{{- define "eni-guard.ownKubelet" -}}
('system:nodes' in request.userInfo.groups && has(oldObject.spec.nodeName) &&
request.userInfo.username == 'system:node:' + oldObject.spec.nodeName)
{{- end -}}

{{- /* An eviction that asks for grace period 0. Any other one may be a removal too, but only the pod tells, which CEL cannot see. */ -}}
{{- define "eni-guard.forcedEviction" -}}
(has(object.deleteOptions) && has(object.deleteOptions.gracePeriodSeconds) && object.deleteOptions.gracePeriodSeconds == 0)
{{- end -}}

{{- /* An UPDATE that gives a pod the label by which Terway lets go of it. */ -}}
{{- define "eni-guard.addsIgnoreLabel" -}}
(has(object.metadata.labels) && 'k8s.aliyun.com/ignore-by-terway' in object.metadata.labels &&
object.metadata.labels['k8s.aliyun.com/ignore-by-terway'] == 'true' &&
!(has(oldObject.metadata.labels) && 'k8s.aliyun.com/ignore-by-terway' in oldObject.metadata.labels &&
oldObject.metadata.labels['k8s.aliyun.com/ignore-by-terway'] == 'true'))
{{- end -}}

{{- /* An UPDATE by anybody but the guard that takes its finalizer from a pod that is marked for removal. */ -}}
{{- define "eni-guard.takesFinalizer" -}}
(has(oldObject.metadata.finalizers) && 'eni-guard.io/sandbox-in-use' in oldObject.metadata.finalizers &&
!(has(object.metadata.finalizers) && 'eni-guard.io/sandbox-in-use' in object.metadata.finalizers) &&
has(oldObject.metadata.deletionTimestamp) &&
(!has(oldObject.metadata.deletionGracePeriodSeconds) || oldObject.metadata.deletionGracePeriodSeconds == 0) &&
request.userInfo.username != 'system:serviceaccount:{{ .Release.Namespace }}:{{ include "eni-guard.name" . }}-webhook')
{{- end -}}

{{- /* A terminal phase that somebody other than a kubelet writes. */ -}}
{{- define "eni-guard.endsPhase" -}}
(has(object.status.phase) && object.status.phase in ['Failed', 'Succeeded'] &&
!(has(oldObject.status.phase) && oldObject.status.phase in ['Failed', 'Succeeded']) &&
!('system:nodes' in request.userInfo.groups))
{{- end -}}

{{- /*
An override that the API server can check by itself, so that it works while no webhook does: annotation and right, and
no expiry, because CEL knows no time. Mirrors overrideOf in webhook/override.go.
*/ -}}
{{- define "eni-guard.authorisedOverride" -}}
(has(oldObject.metadata.annotations) && 'eni-guard.io/allow-force-delete' in oldObject.metadata.annotations &&
!('eni-guard.io/allow-force-delete-until' in oldObject.metadata.annotations) &&
oldObject.metadata.annotations['eni-guard.io/allow-force-delete'].trim() != '' &&
size(oldObject.metadata.annotations['eni-guard.io/allow-force-delete']) <= 500 &&
authorizer.group('eni-guard.io').resource('forcedeletes').namespace(oldObject.metadata.namespace).name(oldObject.metadata.name).check('override').allowed())
{{- end -}}
