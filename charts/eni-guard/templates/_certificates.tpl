{{- /*
The caBundle of a webhook configuration, given its name, where the chart has to repeat it: an older chart has written it, and
Helm takes away what a chart has written once and leaves out then. Where that is not so, there is an annotation.
*/ -}}
{{- define "eni-guard.caBundle" -}}
{{- with lookup "admissionregistration.k8s.io/v1" "ValidatingWebhookConfiguration" "" . -}}
{{- if not (hasKey (.metadata.annotations | default dict) "eni-guard.io/ca-bundle") -}}
{{- (index .webhooks 0).clientConfig.caBundle -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* The clientConfig of a webhook: (list CLIENT-CONFIG NAME-OF-CONFIGURATION). */ -}}
{{- define "eni-guard.clientConfig" -}}
{{- toYaml (first .) }}
{{- with include "eni-guard.caBundle" (last .) }}
caBundle: {{ . }}
{{- end }}
{{- end -}}

{{- /* The annotations of a webhook configuration: (list $ NAME). */ -}}
{{- define "eni-guard.bundleAnnotations" -}}
{{- $root := first . -}}
{{- $certManager := $root.Values.certManager.enabled -}}
{{- if not (include "eni-guard.caBundle" (last .)) }}
eni-guard.io/ca-bundle: written by {{ ternary "cert-manager" "the webhook" $certManager }}
{{- end }}
{{- if $certManager }}
cert-manager.io/inject-ca-from: {{ $root.Release.Namespace }}/{{ include "eni-guard.name" $root }}-webhook-tls
{{- end }}
{{- end -}}

{{- /* A duration such as 90m, in seconds. */ -}}
{{- define "eni-guard.seconds" -}}
{{- mul (int64 (regexFind "^[0-9]+" .)) (get (dict "h" 3600 "m" 60 "s" 1) (regexFind "[hms]$" .)) -}}
{{- end -}}
